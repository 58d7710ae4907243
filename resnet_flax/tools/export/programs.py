"""Writes a trained network as a program that does not need this package."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from ml_collections import ConfigDict

from resnet_flax.models import registry
from resnet_flax.run import load


def write_stablehlo(loaded: load.LoadedModel, folder: pathlib.Path) -> None:
  """Writes `program.stablehlo`, for `jax.export.deserialize`.

  Like `loaded.predict`, it maps uint8[N, H, W, C] images to float32[N, classes]
  probabilities, but only for N > 0. It runs on CPUs, CUDA GPUs and TPUs.
  """
  logits = _logits(loaded)
  batch = export.symbolic_shape("batch")
  exported = export.export(
    jax.jit(lambda images: jax.nn.softmax(logits(images))),
    platforms=("cpu", "cuda", "tpu"),
  )(jax.ShapeDtypeStruct((*batch, *loaded.image_shape), jnp.uint8))
  (folder / "program.stablehlo").write_bytes(exported.serialize())


def write_onnx(loaded: load.LoadedModel, folder: pathlib.Path) -> None:
  """Writes `model.onnx`, which maps 'images' to 'probabilities'.

  Images are uint8[N, H, W, C], probabilities float32[N, classes]. The network
  computes in float32, even if it was trained in bfloat16. The metadata's
  `class_names` is a JSON list in the order of the labels, empty if unknown.
  """
  from resnet_flax.tools.export import onnx_graph

  logits = _logits(loaded, dtype="float32")
  path = folder / "model.onnx"
  onnx_graph.write(logits, loaded.image_shape, loaded.class_names, path)


def _logits(
  loaded: load.LoadedModel, **changes: str
) -> Callable[[jax.Array], jax.Array]:
  """The function from images to logits; `changes` override `config.model`."""
  no_loops = {"scan": False, "remat": False}
  config = ConfigDict(loaded.config.model.to_dict() | no_loops | changes)
  model: Any = registry.create_model(config, loaded.model.num_classes)
  # XLA's own convolutions are used, since oneDNN's cannot be saved.
  conv = functools.partial(model.conv, conv_general_dilated=None)
  model = model.clone(conv=conv)

  def logits(images):
    return model.apply(loaded.variables, loaded.preprocess(images), train=False)

  return logits
