"""Starts a network from another run's weights, for fine-tuning."""

import logging
import pathlib

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import (
  checkpoint,
  errors,
  inference,
  mesh as mesh_lib,
  models,
  train_step,
)

_logger = logging.getLogger(__name__)

_HEAD = "head"

# What may be another in the run that the weights come from: the shapes show
# the rest, or it is no part of the function that the weights stand for.
_MAY_DIFFER = (
  "num_filters",
  "num_classes",
  "input_size",
  "dtype",
  "remat",
  "scan",
  "dropout",
  "gate_bias",
  "batch_norm_momentum",
)


def load(config: ConfigDict) -> inference.LoadedModel:
  """The network that `config.init_from` names.

  Args:
    config: of the run that starts from it.

  Raises:
    ConfigError: its weights do not stand for the same function here.
    WorkdirError: there is no readable run or no checkpoint there.
  """
  try:
    source = inference.load_model(pathlib.Path(config.init_from))
  except errors.UserError as error:
    raise errors.WorkdirError(f"init_from: {error}") from error
  differing = [
    f"model.{key} ({there!r} there, {here!r} here)"
    for key in sorted(config.model.keys())
    if key not in _MAY_DIFFER
    and (there := _value(source.config.model, key))
    != (here := _value(config.model, key))
  ]
  if differing:
    raise errors.ConfigError(
      f"init_from={config.init_from} holds another network, which differs in"
      f" {', '.join(differing)}. Pass its values, or another init_from."
    )
  if config.normalization != source.config.normalization:
    _logger.warning(
      "warning: normalization=%s, but the weights of init_from were trained"
      " with %s",
      config.normalization,
      source.config.normalization,
    )
  return source


def _value(config: ConfigDict, key: str) -> object:
  return models.shortcut(config) if key == "shortcut" else config[key]


def initialize(
  state: train_step.TrainState, source: inference.LoadedModel, mesh: Mesh
) -> train_step.TrainState:
  """A new state with another network's parameters and statistics.

  Its head stays as it was drawn if it has other classes.

  Args:
    state: before the first step.
    source: from `load`.
    mesh: gets a copy of the state on every device.

  Raises:
    ConfigError: an array has another shape.
  """
  params = dict(source.variables["params"])
  shapes = jax.tree.map(lambda x: x.shape, (params[_HEAD], state.params[_HEAD]))
  if shapes[0] != shapes[1]:
    params[_HEAD] = state.params[_HEAD]
    _logger.info("the head of init_from has other classes: it starts anew")
  new = state.replace(
    params=params, batch_stats=source.variables["batch_stats"]
  )
  there = checkpoint.named_arrays(new)
  for name, array in checkpoint.named_arrays(state).items():
    if there[name].shape != array.shape:
      raise errors.ConfigError(
        f"init_from: {name} is {list(there[name].shape)} there,"
        f" {list(array.shape)} here. Pass the model.num_filters and"
        " model.input_size that it was trained with."
      )
  return jax.device_put(new, mesh_lib.replicated(mesh))
