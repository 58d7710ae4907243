"""Networks of every family, and the errors of their programs.

`python -m tests.tools.export.networks` prints the table in docs/use.md.
"""

import contextlib
import dataclasses
import pathlib
import tempfile

import jax
import numpy as np
import pytest
from jax import export

from configs import base
from resnet_flax import step as step_lib
from resnet_flax.data import normalize
from resnet_flax.models import feedforward
from resnet_flax.run import experiment as experiment_lib, load
from resnet_flax.tools.export import programs

_IMAGENET = {"name": "resnet_imagenet", "input_size": 40}
# Titles and keys of `config.model`.
NETWORKS = {
  "resnet_v1, shortcuts keras": {},
  "resnet_v1, shortcuts A": {"shortcut": "A"},
  "resnet_v1, shortcuts B": {"shortcut": "B"},
  "resnet_v1, shortcuts C": {"shortcut": "C", "padding": "symmetric"},
  "resnet_v1, no bias": {"conv_bias": False},
  "resnet_v1, norm none": {"norm": "none"},
  "resnet_v1, scan and remat": {"depth": 20, "scan": True, "remat": True},
  "resnet_v1, input_size 20": {"input_size": 20},
  "resnet_v1, bfloat16": {"dtype": "bfloat16"},
  "resnet_v2": {"name": "resnet_v2", "depth": 11},
  "plain": {"name": "plain"},
  "preact": {"name": "preact"},
  "highway": {"name": "highway"},
  "wide_resnet": {"name": "wide_resnet", "depth": 10, "widen_factor": 2},
  "resnext": {"name": "resnext", "depth": 11, "groups": 2},
  "resnet_v1, squeeze-and-excitation": {"squeeze_excitation": 2},
  "preact, stochastic depth": {"name": "preact", "stochastic_depth": 0.5},
  "resnet_imagenet 18": _IMAGENET | {"depth": 18},
  "resnet_imagenet 50": _IMAGENET | {"depth": 50},
  "resnet_imagenet 50, stride in 1x1": _IMAGENET
  | {"depth": 50, "stride_in_3x3": False, "padding": "symmetric"},
  "plain_imagenet 18": _IMAGENET | {"name": "plain_imagenet", "depth": 18},
  "vgg": {"name": "vgg", "depth": 19, "norm": "none"},
  "vgg, batch norm": {"name": "vgg", "depth": 19},
  "alexnet": {"name": "alexnet", "depth": 8, "input_size": 64},
}


@contextlib.contextmanager
def few_filters():
  """VGG and AlexNet have 8 filters in each layer, and 64 hidden units."""
  with pytest.MonkeyPatch.context() as patch:
    for network in feedforward.NETWORKS.values():
      narrow = [
        dataclasses.replace(layer, num_filters=8)
        if isinstance(layer, feedforward.Conv)
        else layer
        for layer in network["features"]
      ]
      patch.setitem(network, "features", narrow)
      patch.setitem(network, "hidden_sizes", (64, 64))
    yield


def load_random(normalization="channel", **changes):
  """What `load_model` gives of a network with random numbers.

  `changes` are of `config.model`.
  """
  config = base.get_config()
  config.dataset.name = "digits"
  config.normalization = normalization
  config.model.update({"depth": 8, "num_filters": 4} | changes)
  experiment = experiment_lib.build(config)
  rng = np.random.default_rng(0)
  placeholder = normalize.placeholder(normalization, experiment.image_shape)
  scale = jax.tree.map(
    lambda leaf: rng.uniform(0.2, 0.8, leaf.shape).astype(np.float32),
    placeholder,
  )
  state = jax.eval_shape(
    lambda key: step_lib.create_train_state(experiment, key, scale),
    jax.random.key(0),
  )

  def draw(path, leaf):
    name = path[-1].key
    if name == "kernel":
      fan_in = np.prod(leaf.shape[:-1])
      drawn = rng.normal(0, np.sqrt(2 / fan_in), leaf.shape)
    elif name in ("scale", "var"):
      drawn = rng.uniform(0.5, 1.5, leaf.shape)
    else:
      drawn = rng.normal(0, 0.2, leaf.shape)
    return drawn.astype(np.float32)

  draw_all = jax.tree_util.tree_map_with_path
  state = state.replace(
    step=np.int32(7),
    params=draw_all(draw, state.params),
    batch_stats=draw_all(draw, state.batch_stats),
    normalization=scale,
  )
  state = state.replace(opt_state=(), rate_state=(), epoch_sums={})
  # No probability is nearly 0 or 1, whatever the dtype.
  noise = rng.integers(0, 256, (8, *experiment.image_shape), np.uint8)
  logits = step_lib.apply_eval(experiment.model, state, noise)
  head = state.params["head"]
  factor = 2.0 ** np.round(np.log2(3 / np.abs(logits).max()))
  state.params["head"] = jax.tree.map(lambda leaf: leaf * factor, head)
  with (
    pytest.MonkeyPatch.context() as patch,
    tempfile.TemporaryDirectory() as workdir,
  ):
    (pathlib.Path(workdir) / "config.json").write_text(config.to_json())
    patch.setattr(load, "_restore", lambda *_, **__: (experiment, [state]))
    return load.load_model(workdir)


def images(count=3):
  """uint8[count, 32, 32, 3] noise."""
  return np.random.default_rng(1).integers(0, 256, (count, 32, 32, 3), np.uint8)


def run_onnx(path, inputs):
  """What ONNX Runtime computes."""
  import onnxruntime

  session = onnxruntime.InferenceSession(
    path, providers=["CPUExecutionProvider"]
  )
  return session.run(["probabilities"], {"images": inputs})[0]


def run_stablehlo(path, inputs):
  """What the program computes."""
  return export.deserialize(bytearray(path.read_bytes())).call(inputs)


@few_filters()
def errors_of(title, folder):
  """The largest relative errors of probabilities: of ONNX and StableHLO.

  ONNX has a bfloat16 network in float32, and is compared with that.
  """
  loaded = load_random(**NETWORKS[title])
  programs.write_stablehlo(loaded, folder)
  programs.write_onnx(loaded, folder)
  in_float32 = loaded
  if loaded.config.model.dtype != "float32":
    in_float32 = load_random(**NETWORKS[title] | {"dtype": "float32"})
  found = []
  for run, name, reference in (
    (run_onnx, "model.onnx", in_float32),
    (run_stablehlo, "program.stablehlo", loaded),
  ):
    expected = reference.predict(images())
    probabilities = run(folder / name, images())
    found.append(np.max(np.abs(probabilities / expected - 1)))
  return found


def main():
  """Prints the table."""
  print("| network | `model.onnx` | `program.stablehlo` |\n| --- | --- | --- |")
  for title in NETWORKS:
    with tempfile.TemporaryDirectory() as folder:
      found = errors_of(title, pathlib.Path(folder))
    print(f"| {title} |", *(f"{error:.0e} |" for error in found), flush=True)


if __name__ == "__main__":
  main()
