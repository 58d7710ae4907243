"""Compares converted weights with the libraries that saved them.

  python -m experiments.weights --torch_python=PYTHON --keras_python=PYTHON
    --out=experiments/weights/results.json [--names=resnet18,cifar20]
    [--older_keras_python=PYTHON]

Each library makes random weights in a process of its own environment, saves
them in its own files and records its logits of images (`torch_reference.py`,
`keras_reference.py`). The command converts the files and compares the networks.
It writes OUT after each network and skips networks that OUT already has. The
last lines are the table of README.md.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

import resnet_flax
from configs import base
from experiments.tools import flag_types, markdown
from resnet_flax.run import environment, errors, files as files_lib
from resnet_flax.tools import convert

_FOLDER = pathlib.Path(__file__).parent
_ROOT = _FOLDER.parent.parent

# The relative error up to which logits count as the same.
LIMIT = 1e-4

# The smallest probability at which `predict` is compared.
SMALLEST = 1e-30

_TORCH = {
  "model.padding": "symmetric",
  "model.conv_bias": False,
  "model.batch_norm_epsilon": 1e-5,
  "normalization": "imagenet",
}
_LARGE = {
  "model.input_size": 224,
  # Adam's moments would triple the largest checkpoints.
  "optimizer.name": "sgd",
}


def _network(name: str, depth: int, **keys: Any) -> dict[str, Any]:
  """A network's overrides of configs/base.py, from its keys of `model`."""
  keys = {"name": name, "depth": depth, **keys}
  return {f"model.{key}": value for key, value in keys.items()}


def _torchvision(depth: int, **block: int) -> dict[str, Any]:
  network = _network("resnet_imagenet", depth, **block, scan=True)
  return network | _TORCH | _LARGE


def _feedforward(name: str, depth: int, norm: str) -> dict[str, Any]:
  network = _TORCH | _LARGE | _network(name, depth, conv_bias=True)
  return network | {"model.norm": norm}


def _cifar(depth: int) -> dict[str, Any]:
  return _network("resnet_v1", depth, shortcut="A", scan=True) | _TORCH


def _application(depth: int) -> dict[str, Any]:
  keys = {"padding": "symmetric", "batch_norm_epsilon": 1.001e-5}
  keys |= {"stride_in_3x3": False, "scan": True}
  network = _network("resnet_imagenet", depth, **keys)
  return network | _LARGE | {"normalization": "caffe"}


def _example(name: str, depth: int) -> dict[str, Any]:
  # Without normalization the experiment needs no data.
  return _network(name, depth, scan=True) | {"normalization": "none"}


# The networks of each library, with their overrides of configs/base.py.
TORCH = {
  **{f"resnet{depth}": _torchvision(depth) for depth in (18, 34, 50, 101, 152)},
  "wide_resnet50_2": _torchvision(50, group_width=128),
  "wide_resnet101_2": _torchvision(101, group_width=128),
  "resnext50_32x4d": _torchvision(50, groups=32, group_width=4),
  "resnext101_32x8d": _torchvision(101, groups=32, group_width=8),
  "vgg19": _feedforward("vgg", 19, "none"),
  "vgg19_bn": _feedforward("vgg", 19, "batch_norm"),
  "alexnet": _feedforward("alexnet", 8, "batch_norm"),
  **{f"cifar{depth}": _cifar(depth) for depth in (20, 32, 44, 56, 110)},
}
KERAS = {
  **{f"application_{depth}": _application(depth) for depth in (50, 101, 152)},
  **{f"example_v1_{depth}": _example("resnet_v1", depth) for depth in (20, 56)},
  **{f"example_v2_{depth}": _example("resnet_v2", depth) for depth in (20, 29)},
}
# Before Keras 3.8, weight files do not name layers.
OLDER_KERAS = {
  f"older_{name}": KERAS[name]
  for name in ("application_50", "example_v1_20", "example_v2_20")
}

# PyTorch's environment runs this: the other files must hold the arrays of the
# safetensors file, the only file that is converted here.
_SAME_ARRAYS = """
import pathlib, sys
import numpy as np
from resnet_flax.tools.weights import files
one, other = (files.read(pathlib.Path(path)) for path in sys.argv[1:])
assert one.arrays.keys() == other.arrays.keys()
assert sorted(one.passed_over) == sorted(other.passed_over)
for name, array in one.arrays.items():
  assert np.array_equal(array, other.arrays[name]), name
"""
# A file that would run a command when it is unpickled.
_CODE = """
import os, pathlib, sys, torch
from resnet_flax.run import errors
from resnet_flax.tools.weights import files
class Code:
  def __reduce__(self):
    return os.system, (f"touch {sys.argv[1]}/ran",)
path = pathlib.Path(sys.argv[1]) / "code.pt"
torch.save({"conv1.weight": Code()}, path)
try:
  files.read(path)
except errors.WeightsError as error:
  print(str(error).replace(str(path), path.name))
assert not (pathlib.Path(sys.argv[1]) / "ran").exists()
"""


def relative_error(ours: Any, theirs: np.ndarray) -> float:
  """max|ours - theirs| / max|theirs|."""
  return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def _centred(logits: np.ndarray, kept: np.ndarray) -> np.ndarray:
  """Logits less their mean, which probabilities lack; 0 where not `kept`."""
  mean = logits.mean(axis=-1, keepdims=True, where=kept)
  return np.where(kept, logits - mean, 0)


def run(*command: Any, keras_backend: str = "tensorflow") -> str:
  """The output of a library's process, on the CPU."""
  environ = {
    "CUDA_VISIBLE_DEVICES": "",
    "KERAS_BACKEND": keras_backend,
    "PYTHONPATH": str(_ROOT),
  }
  process = subprocess.run(
    list(map(str, command)),
    cwd=_ROOT,
    env=os.environ | environ,
    capture_output=True,
    text=True,
  )
  if process.returncode:
    raise errors.UserError(
      f"{command[:3]} failed with exit status {process.returncode}; its"
      f" messages end with: {process.stderr[-2000:]}"
    )
  return process.stdout.strip()


def our_versions() -> dict[str, Any]:
  """The commit, and the versions of JAX and Flax."""
  ours = environment.describe(jax.devices())
  libraries = {name: ours["libraries"][name] for name in ("jax", "flax")}
  return {name: ours[name] for name in ("git_commit", "git_clean")} | libraries


def compare(
  overrides: dict[str, Any], folder: pathlib.Path, source: pathlib.Path
) -> dict[str, Any]:
  """Converts the file `source` and compares logits and probabilities.

  `folder` holds reference.npz; a workdir in it is made and removed. Gives the
  relative errors of `logits` and `predict`, and facts about the file.
  """
  config = base.get_config()
  config.update_from_flattened_dict(overrides)
  started = time.perf_counter()
  converted = convert.convert(source, config, folder / "run")
  seconds = time.perf_counter() - started
  loaded = resnet_flax.load_model(folder / "run")
  reference = np.load(folder / "reference.npz")
  apply = jax.jit(
    lambda variables, x: loaded.model.apply(variables, x, train=False)
  )
  logits = apply(loaded.variables, reference["inputs"])
  # Logarithms are compared, since a probability near 1 would hide errors of the
  # small ones. Float32 loses the digits of the smallest probabilities.
  probabilities = loaded.predict(reference["images"])
  kept = probabilities > SMALLEST
  ours = _centred(np.log(np.maximum(probabilities, SMALLEST)), kept)
  theirs = _centred(reference["image_logits"], kept)
  result = {
    "holds": converted.title,
    "arrays": converted.num_arrays,
    "passed_over": len(converted.passed_over),
    "largest_logit": float(np.abs(reference["logits"]).max()),
    "logits": relative_error(logits, reference["logits"]),
    "predict": relative_error(ours, theirs),
    "predict_kept": float(kept.mean()),
    "seconds": round(seconds, 1),
  }
  shutil.rmtree(folder / "run")
  return result


def measure(
  name: str, python: pathlib.Path, overrides: dict[str, Any]
) -> dict[str, Any]:
  """Makes a network in its library and compares each of its files."""
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    library = "torch" if name in TORCH else "keras"
    worker = _FOLDER / f"{library}_reference.py"
    base_name = name.removeprefix("older_")
    output = run(python, worker, f"--name={base_name}", f"--folder={folder}")
    versions = json.loads(output.splitlines()[-1])
    result = {"versions": versions | our_versions(), "files": {}}
    sources = sorted(folder.glob("weights.*"))
    if library == "torch":
      safe = folder / "weights.safetensors"
      for source in sources:
        if source != safe:
          run(python, "-c", _SAME_ARRAYS, source, safe)
          result["files"][source.suffix] = "the same arrays as .safetensors"
      sources = [safe]
      if name == "cifar20":
        result["pickle_with_code"] = run(python, "-c", _CODE, folder)
    for source in sources:
      extension = source.name.removeprefix("weights")
      result["files"][extension] = compare(overrides, folder, source)
    return result


def table(results: dict[str, Any]) -> str:
  """Formats the results as a Markdown table."""
  rows = []
  for name, result in results.items():
    compared = {k: v for k, v in result["files"].items() if isinstance(v, dict)}
    first = next(iter(compared.values()))
    title = first["holds"]
    if name.startswith("older_"):
      title += f", Keras {result['versions']['keras']}"
    cells = [
      title,
      ", ".join(f"`{extension}`" for extension in result["files"]),
      first["arrays"],
      max(value["passed_over"] for value in compared.values()),
      f"{first['largest_logit']:.1f}",
      f"{max(value['logits'] for value in compared.values()):.1e}",
      f"{max(value['predict'] for value in compared.values()):.1e}",
    ]
    rows.append(cells)
  titles = (
    *("network", "files", "arrays", "passed over", "largest logit", "logits"),
    "`predict`",
  )
  return markdown.table(titles, rows)


def parse(
  program: str, names: Collection[str], *libraries: str
) -> tuple[argparse.Namespace, dict[str, Any]]:
  """Parses --LIBRARY_python and the other flags; reads the results in --out."""
  parser = argparse.ArgumentParser(f"python -m {program}")
  for library in libraries:
    parser.add_argument(f"--{library}_python", type=pathlib.Path)
  known = flag_types.names(names)
  parser.add_argument("--names", type=known, default=",".join(names))
  parser.add_argument("--out", type=flag_types.output, required=True)
  arguments = parser.parse_args()
  out = arguments.out
  return arguments, json.loads(out.read_text()) if out.exists() else {}


def main() -> None:
  """Measures the networks that --out lacks, and prints all as a table."""
  arguments, results = parse(
    *("experiments.weights", TORCH | KERAS | OLDER_KERAS),
    *("torch", "keras", "older_keras"),
  )
  sets = (
    (arguments.torch_python, TORCH),
    (arguments.keras_python, KERAS),
    (arguments.older_keras_python, OLDER_KERAS),
  )
  for python, networks in sets:
    for name, overrides in networks.items():
      if python and name in arguments.names and name not in results:
        results[name] = measure(name, python, overrides)
        print(name, results[name], flush=True)
        files_lib.write_json(arguments.out, results)
  print(table(results))
  files = [file for r in results.values() for file in r["files"].values()]
  found = [file for file in files if isinstance(file, dict)]
  # This is true for NaN, too.
  if not all(file[k] <= LIMIT for file in found for k in ("logits", "predict")):
    sys.exit(f"error: a relative error is larger than {LIMIT}")


if __name__ == "__main__":
  main()
