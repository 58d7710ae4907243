"""Compares exported weights with the libraries that load them.

  python -m experiments.weights.way_out --torch_python=PYTHON
    --keras_python=PYTHON --out=experiments/weights/way_out.json

The command makes workdirs of random networks and exports them. Each library
loads the files in a process of its own environment (`torch_reference.py`,
`keras_reference.py`), and both sides get the same inputs. The command writes
OUT after each network and skips networks that OUT already has. The last lines
are the table of README.md.
"""

import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import resnet_flax
from configs import base
from experiments.tools import markdown
from experiments.weights.__main__ import (
  KERAS,
  TORCH,
  our_versions,
  parse,
  relative_error,
  run,
)
from resnet_flax.data import normalize
from resnet_flax.run import (
  experiment as experiment_lib,
  files as files_lib,
  load,
)
from resnet_flax.tools import convert
from resnet_flax.tools.export import weights

_FOLDER = pathlib.Path(__file__).parent

NUM_IMAGES = 256
# The side of the inputs of networks for large images.
SIDE = 64
# The compared networks, by their names in `__main__`.
NAMES = (
  *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
  *("wide_resnet50_2", "wide_resnet101_2"),
  *("resnext50_32x4d", "resnext101_32x8d"),
  *("vgg19", "vgg19_bn", "alexnet", "cifar20", "cifar56"),
  *("application_50", "example_v1_20", "example_v1_56", "example_v2_29"),
)
# The relative error up to which logits count as the same.
LIMIT = 1e-5

# The file of each format of weights.
FILES = {
  "safetensors": "weights.safetensors",
  "torch": "weights.pt",
  "keras": "model.weights.h5",
}


def make_config(overrides: dict[str, Any], side: int = SIDE) -> ConfigDict:
  """Overrides configs/base.py, for inputs with sides of `side` pixels."""
  config = base.get_config()
  config.dataset.name = "digits"
  config.update_from_flattened_dict(overrides)
  if config.model.input_size:
    config.model.input_size = side
  return config


def random_network(config: ConfigDict) -> load.LoadedModel:
  """Makes an untrained network in which every number affects the output.

  Running statistics are measured on a batch, so that deep networks neither
  explode nor die, and are then changed at random. So that rounding errors do
  not grow with the depth, branches are small compared with their shortcuts, and
  most values pass the ReLUs of networks without shortcuts.
  """
  config.model.batch_norm_momentum = 0.0
  experiment = experiment_lib.build(config)
  model, rng = experiment.model, np.random.default_rng(0)
  side = config.model.input_size or 32
  images = rng.normal(0, 1, (64, side, side, 3)).astype(np.float32)
  initial = model.lazy_init(jax.random.key(0), images[:1], train=False)

  block = initial["params"].get("stage1_block1", {})
  # The norm before a shortcut's sum: VGG has no sum, v2 has a convolution.
  last_norm = "bn3" if "bn3" in block else "bn2"
  if not block or config.model.name == "resnet_v2":
    last_norm = ""

  def drawn(path: Any, leaf: jax.Array) -> np.ndarray:
    layer, kind = path[-2].key, path[-1].key
    if kind == "kernel":
      return np.asarray(leaf)
    low, high = (0.5, 0.7) if kind == "scale" else (-0.1, 0.1)
    if not block and layer.startswith("bn") and kind == "bias":
      low, high = 0.4, 0.6
    if (layer, kind) == (last_norm, "scale"):
      low, high = 0.02, 0.06
    return rng.uniform(low, high, leaf.shape).astype(np.float32)

  params = jax.tree_util.tree_map_with_path(drawn, initial["params"])
  variables = {"params": params, "batch_stats": initial.get("batch_stats", {})}

  @jax.jit
  def measured(variables: Any) -> Any:
    key = jax.random.key(0)
    _, updated = model.apply(
      variables,
      images,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": key},
    )
    return updated.get("batch_stats", {})

  stats = jax.tree.map(
    lambda a: np.float32(a * rng.uniform(0.8, 1.2, a.shape)),
    measured(variables),
  )
  return load.LoadedModel(
    model=model,
    variables=variables | {"batch_stats": stats},
    predict=lambda images: None,
    preprocess=normalize.placeholder("none", experiment.image_shape),
    class_names=(),
    image_shape=experiment.image_shape,
    config=config,
    step=0,
    seed=0,
  )


def measure(
  name: str, python: pathlib.Path, overrides: dict[str, Any]
) -> dict[str, Any]:
  """Exports a random network and compares our logits with the library's.

  Gives the relative error of logits by format, the largest logit, and whether
  `convert` gave back bit-identical arrays.
  """
  is_torch = name in TORCH
  config = make_config(overrides)
  if config.model.input_size:
    config.model.num_classes = 1000  # As in the libraries' networks.
  side = config.model.input_size or 32
  drawn = random_network(config)
  names = "keras"
  if is_torch:
    names = "cifar" if name.startswith("cifar") else "torchvision"
  network = weights.named(drawn, names)
  rng = np.random.default_rng(1)
  inputs = rng.normal(0, 1, (NUM_IMAGES, side, side, 3)).astype(np.float32)
  apply = jax.jit(lambda v, x: drawn.model.apply(v, x, train=False))
  ours = np.concatenate(
    [apply(drawn.variables, x) for x in np.split(inputs, 8)]
  )
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    sees_bgr = name.startswith("application")
    np.save(folder / "inputs.npy", inputs[..., ::-1] if sees_bgr else inputs)
    weights.write("safetensors", network, drawn, folder)
    workdir = folder / "run"
    convert.convert(folder / FILES["safetensors"], config, workdir)
    returned = resnet_flax.load_model(workdir).variables
    same = jax.tree.map(np.array_equal, returned, drawn.variables)
    result: dict[str, Any] = {
      "holds": network.title,
      "arrays": len(network.arrays),
      "largest_logit": float(np.abs(ours).max()),
      "same_bits_after_convert": all(jax.tree.leaves(same)),
      "errors": {},
    }
    for form in ("safetensors", "torch" if is_torch else "keras"):
      out = folder / form
      options = [f"--format={form}", f"--out={out}", f"--names={names}"]
      run(python, "-m", "resnet_flax.export", workdir, *options)
      worker = _FOLDER / f"{'torch' if is_torch else 'keras'}_reference.py"
      options = [f"--name={name}", f"--folder={folder}"]
      options.append(f"--weights={out / FILES[form]}")
      output = run(python, worker, *options, keras_backend="jax")
      result["versions"] = json.loads(output.splitlines()[-1]) | our_versions()
      theirs = np.load(folder / "logits.npy")
      result["errors"][form] = relative_error(ours, theirs)
  return result


def table(results: dict[str, Any]) -> str:
  """Formats the results as a Markdown table."""
  rows = []
  for result in results.values():
    errors = [result["errors"].get(form) for form in FILES]
    cells = [
      result["holds"],
      result["arrays"],
      f"{result['largest_logit']:.3g}",
      *("–" if error is None else f"{error:.1e}" for error in errors),
      "every bit" if result["same_bits_after_convert"] else "no",
    ]
    rows.append(cells)
  titles = (
    *("network", "arrays", "largest logit", "`safetensors`", "`torch`"),
    *("`keras`", "back by `convert`"),
  )
  return markdown.table(titles, rows)


def main() -> None:
  """Measures the networks that --out lacks, and prints all as a table."""
  program = "experiments.weights.way_out"
  arguments, results = parse(program, NAMES, "torch", "keras")
  for name in NAMES:
    is_torch, overrides = name in TORCH, (TORCH | KERAS)[name]
    python = arguments.torch_python if is_torch else arguments.keras_python
    if python and name in arguments.names and name not in results:
      results[name] = measure(name, python, overrides)
      print(name, results[name], flush=True)
      files_lib.write_json(arguments.out, results)
  print(table({name: results[name] for name in NAMES if name in results}))
  errors = [e for r in results.values() for e in r["errors"].values()]
  if not all(error <= LIMIT for error in errors):
    sys.exit(f"error: a relative error is larger than {LIMIT}")


if __name__ == "__main__":
  main()
