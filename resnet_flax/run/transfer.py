"""Starts a network from another run's weights, for fine-tuning."""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from resnet_flax import models, step as train_step
from resnet_flax.run import errors, load as inference

_logger = logging.getLogger(__name__)

_HEAD = "head"

# What may be another in the run that the weights come from: it is no part of
# the function that they stand for.
_MAY_DIFFER = (
  "num_classes",
  "input_size",
  "dtype",
  "remat",
  "scan",
  "dropout",
  "gate_bias",
  "batch_norm_momentum",
)


def load(config: ConfigDict) -> dict[str, Any]:
  """The variables of the network that `config.init_from` names.

  Args:
    config: of the run that starts from it.

  Returns:
    {'params': ..., 'batch_stats': ...} of its best checkpoint.

  Raises:
    ConfigError: they do not stand for the same function here.
    WorkdirError: there is no readable run or no checkpoint there.
  """
  workdir = pathlib.Path(config.init_from)
  if not workdir.is_dir():
    raise errors.WorkdirError(
      f"init_from={workdir} is not a folder. Pass a run's workdir;"
      " resnet_flax.convert makes one of a file of weights."
    )
  try:
    source = inference.load_model(workdir)
  except errors.UserError as error:
    raise errors.WorkdirError(
      f"init_from={workdir} cannot be used: {error}"
    ) from error
  differing = [
    f"model.{key} ({there!r} there, {here!r} here)"
    for key in sorted(config.model.keys())
    if key not in _MAY_DIFFER
    and (there := _value(source.config.model, key))
    != (here := _value(config.model, key))
  ]
  if differing:
    raise errors.ConfigError(
      f"init_from={workdir} holds another network, which differs in"
      f" {', '.join(differing)}. Pass its values, or another init_from."
    )
  if config.normalization != source.config.normalization:
    _logger.warning(
      "warning: normalization=%s, but the weights of init_from were trained"
      " with %s",
      config.normalization,
      source.config.normalization,
    )
  _logger.info("starting from step %d of %s", source.step, workdir)
  return source.variables


def _value(config: ConfigDict, key: str) -> object:
  # What is left to the family may be spelt out there, and not here.
  if key == "shortcut":
    return models.shortcut(config)
  if key == "num_filters":
    return models.num_filters(config)
  return config[key]


def initialize(
  state: train_step.TrainState, variables: Mapping[str, Any]
) -> train_step.TrainState:
  """A new state with another network's parameters and statistics.

  Its head stays as it was drawn if it has other classes.

  Args:
    state: before the first step.
    variables: from `load`.
  """
  params = dict(variables["params"])
  if params[_HEAD]["bias"].shape != state.params[_HEAD]["bias"].shape:
    params[_HEAD] = state.params[_HEAD]
    _logger.info("the head of init_from has other classes: it starts anew")
  return state.replace(params=params, batch_stats=variables["batch_stats"])
