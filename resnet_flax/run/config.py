"""Which values each configuration key can have, checked before anything runs.

`configs/base.py` declares the keys and their defaults; this is what the
package can work with, whoever made the configuration. A test holds the two
lists of keys together.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from resnet_flax import optim
from resnet_flax.data import (
  augment,
  crops,
  loading,
  normalize as normalization,
  streaming,
)
from resnet_flax.models import layers, registry
from resnet_flax.parallel import mesh
from resnet_flax.run import errors, metrics

Rule = Callable[[str, Any], None]

# Keys that do not change the mathematics: they may differ when a run goes on.
FREE_KEYS = (
  "seed_execution",
  "steps_per_call",
  "eval_batch_size",
  "log_layer_norms_every",
  "dataset.data_dir",
  "dataset.archive",
  "dataset.cache_dir",
  "dataset.num_workers",
  "model.remat",
  "model.scan",
  "checkpoint.every_steps",
  "checkpoint.every_minutes",
  "log.tensorboard",
  "log.interval_seconds",
)

# Keys that came later, each with the value that stands for what was done before
# there was one: for the stored configurations of older runs.
_ADDED_KEYS = {
  "num_seeds": 1,
  "seed_execution": "auto",
  "log_layer_norms_every": 0,
  "steps_per_call": 0,
  "dataset.image_size": 224,
  "dataset.num_workers": -1,
  "model.batch_norm_groups": 1,
  "label_smoothing": 0.0,
  "schedule.name": "drops",
  "schedule.linear_warmup_epochs": 0.0,
  "dataset.test_crops": 1,
}

_LARGEST_INTEGER = 2**31 - 1
# Twice the largest is still a finite float32; the least is not taken for zero.
_LARGEST_NUMBER = 1e38
_LEAST_POSITIVE = 1e-37
# He et al. go to 1202 layers. What is larger than these would take hours, or
# all memory, before it fails.
_LARGEST_DEPTH = 2000
_LARGEST_WIDTH = 1024
_LARGEST_NUM_CLASSES = 10**6
_LARGEST_INPUT = 2048
_LARGEST_EVAL_BATCH = 2**16
_MOST_SEEDS = 1000
_MOST_WORKERS = 256
_TFDS_NAME = re.compile(
  re.escape(streaming.PREFIX) + r"\w{1,100}(/[\w-]{1,100})?"
)
_LONGEST_SEQUENCE = 100
_LONGEST_PATH = 4096


def _wrong(key: str, value: Any, needed: str) -> errors.ConfigError:
  return errors.ConfigError(
    f"{key}={_shown(value)} cannot be used; needed: {needed}."
  )


def _shown(value: Any) -> str:
  try:
    text = repr(value)
  # Integers of thousands of digits have none, nor has what a config file made.
  except Exception:
    return f"({type(value).__name__})"
  return text if len(text) <= 100 else f"{text[:100]}..."


def _integer(low: int, high: int = _LARGEST_INTEGER) -> Rule:
  """An integer, by default one that int32 holds."""
  needed = f"an integer from {low} to {high}"

  def check(key: str, value: Any) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or not low <= value <= high:
      raise _wrong(key, value, needed)

  return check


def _number(low: float, high: float = _LARGEST_NUMBER) -> Rule:
  """A number in [low, high), also when it is rounded to float32."""
  needed = f"a number from {low:g} and below {high:g}"

  def check(key: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
      not is_number
      # The first comparison also ends what float32 cannot hold, and NaN.
      or not low <= value < high
      or not np.float32(low) <= np.float32(value) < np.float32(high)
    ):
      raise _wrong(key, value, needed)

  return check


def _one_of(*values: int) -> Rule:
  needed = " or ".join(map(str, values))

  def check(key: str, value: Any) -> None:
    if isinstance(value, bool) or value not in values:
      raise _wrong(key, value, needed)

  return check


def _sequence(rule: Rule) -> Rule:
  needed = f"a tuple of at most {_LONGEST_SEQUENCE}, on the command line 1,2,3"

  def check(key: str, value: Any) -> None:
    if not isinstance(value, tuple | list) or len(value) > _LONGEST_SEQUENCE:
      raise _wrong(key, value, needed)
    for element in value:
      rule(key, element)

  return check


def _name(known: Any) -> Rule:
  def check(key: str, value: Any) -> None:
    if not isinstance(value, str):
      raise _wrong(key, value, "a name")
    if value not in known:
      raise errors.unknown_name(key, value, known)

  return check


def _dataset_name(key: str, value: Any) -> None:
  if not isinstance(value, str) or not _TFDS_NAME.fullmatch(value):
    _name(loading.NAMES)(key, value)


def _boolean(key: str, value: Any) -> None:
  if not isinstance(value, bool):
    raise _wrong(key, value, "true or false")


def _path(key: str, value: Any) -> None:
  try:
    usable = len(os.fsencode(value)) <= _LONGEST_PATH and "\0" not in value
  # No text, or one with half a character in it.
  except (TypeError, ValueError):
    usable = False
  if not isinstance(value, str) or not usable:
    raise _wrong(key, value, "a path")


_POSITIVE = _number(_LEAST_POSITIVE)
_NOT_NEGATIVE = _number(0)

RULES: dict[str, Rule] = {
  "seed": _integer(0, 2**32 - 1),
  "num_seeds": _integer(1, _MOST_SEEDS),
  "seed_execution": _name(("auto", "in_turn", "vectorized")),
  "batch_size": _integer(1),
  "steps_per_call": _integer(0),
  "num_epochs": _integer(1),
  "eval_batch_size": _integer(1, _LARGEST_EVAL_BATCH),
  "log_layer_norms_every": _integer(0),
  "label_smoothing": _number(0, 1),
  "init_from": _path,
  "normalization": _name(normalization.NAMES),
  "dataset.name": _dataset_name,
  "dataset.data_dir": _path,
  "dataset.archive": _path,
  "dataset.cache_dir": _path,
  "dataset.image_size": _integer(1, _LARGEST_INPUT),
  "dataset.num_workers": _integer(-1, _MOST_WORKERS),
  "dataset.test_crops": _one_of(1, crops.NUM_TEN),
  "dataset.train_examples": _integer(0),
  "dataset.validation_examples": _integer(0),
  "dataset.split_seed": _integer(0, 2**32 - 1),
  "augment.name": _name(augment.NAMES),
  "augment.flip": _boolean,
  "model.name": _name(registry.MODELS),
  "model.depth": _integer(1, _LARGEST_DEPTH),
  "model.num_filters": _integer(0, _LARGEST_WIDTH),
  "model.num_classes": _integer(0, _LARGEST_NUM_CLASSES),
  "model.input_size": _integer(0, _LARGEST_INPUT),
  "model.dtype": _name(registry.DTYPES),
  "model.shortcut": _name(registry.SHORTCUTS),
  "model.stride_in_3x3": _boolean,
  "model.gate_bias": _number(-100, 100),
  "model.batch_norm": _boolean,
  "model.dropout": _number(0, 1),
  "model.padding": _name(layers.PADDINGS),
  "model.conv_bias": _boolean,
  "model.batch_norm_momentum": _number(0, 1),
  "model.batch_norm_epsilon": _POSITIVE,
  "model.batch_norm_groups": _integer(1),
  "model.remat": _boolean,
  "model.scan": _boolean,
  "optimizer.name": _name(optim.OPTIMIZERS),
  "optimizer.learning_rate": _POSITIVE,
  "optimizer.b1": _number(0, 1),
  "optimizer.b2": _number(0, 1),
  "optimizer.epsilon": _POSITIVE,
  "optimizer.momentum": _number(0, 1),
  "optimizer.l2": _NOT_NEGATIVE,
  "optimizer.l2_weights": _name(optim.L2_WEIGHTS),
  "schedule.name": _name(optim.SCHEDULES),
  "schedule.linear_warmup_epochs": _NOT_NEGATIVE,
  "schedule.drop_percents": _sequence(_integer(1, 100)),
  "schedule.drop_factors": _sequence(_POSITIVE),
  "schedule.drop_inclusive": _boolean,
  "schedule.warmup_learning_rate": _NOT_NEGATIVE,
  "schedule.warmup_error": _number(_LEAST_POSITIVE, 1),
  "schedule.warmup_min_depth": _integer(0),
  "plateau.enabled": _boolean,
  "plateau.factor": _number(_LEAST_POSITIVE, 1),
  "plateau.patience": _integer(1),
  "plateau.cooldown": _integer(0),
  "plateau.min_delta": _POSITIVE,
  "plateau.min_lr": _NOT_NEGATIVE,
  "checkpoint.every_steps": _integer(0),
  "checkpoint.every_minutes": _NOT_NEGATIVE,
  "checkpoint.monitor": _name(metrics.MONITORED),
  "log.tensorboard": _boolean,
  "log.interval_seconds": _NOT_NEGATIVE,
}


def with_added_keys(stored: Mapping[str, Any]) -> dict[str, Any]:
  """A configuration that an older version stored, with what it did not know.

  Args:
    stored: a configuration as nested dictionaries; is not changed.
  """
  config = dict(stored)
  for key, value in _ADDED_KEYS.items():
    part, _, name = key.rpartition(".")
    if not part:
      config.setdefault(key, value)
    elif isinstance(config.get(part), Mapping):
      config[part] = {name: value} | config[part]
  return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """A nested dictionary as {'model.depth': 20, ...}."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def to_flat(config: ConfigDict) -> dict[str, Any]:
  """A configuration as {'model.depth': 20, ...}.

  Raises:
    ConfigError: it has values that cannot be had, or keys that are no text.
  """
  try:
    return flatten(config.to_dict())
  # Placeholders and references are computed here, as a config file says.
  except Exception as error:
    raise errors.ConfigError(
      f"the configuration cannot be read: {errors.one_line(error)}."
    ) from error


def check_values(config: ConfigDict) -> None:
  """Checks each key and value by itself.

  Raises:
    ConfigError: the first thing that is wrong, and what would work.
  """
  flat = to_flat(config)
  for key in sorted(flat.keys() - RULES.keys()):
    raise errors.unknown_name("config key", key, RULES)
  missing = sorted(RULES.keys() - flat.keys())
  if missing:
    raise errors.ConfigError(
      f"the configuration lacks {', '.join(missing)}: it was made by another"
      " version of this program. Start from configs/base.py."
    )
  for key, rule in RULES.items():
    rule(key, flat[key])


def check(config: ConfigDict, num_devices: int) -> None:
  """Checks a configuration as a whole.

  Args:
    config: every key of `configs/base.py`.
    num_devices: devices of the run.

  Raises:
    ConfigError: the first thing that is wrong, and what would work.
    DataError: see `loading.info`.
  """
  check_values(config)

  # Constraints between keys.
  _check_streaming(config)
  registry.create_model(config.model, num_classes=1)
  registry.check_input_size(
    config.model, loading.info(config.dataset).image_shape
  )
  num_train = loading.num_train_examples(config.dataset)
  if config.batch_size > num_train:
    raise errors.ConfigError(
      f"batch_size={config.batch_size} is more than the {num_train} training"
      f" images; at most {num_train} makes an epoch of at least one step."
    )
  # Those that share a batch.
  num_devices //= mesh.num_groups(num_devices, config.num_seeds)
  if config.batch_size % num_devices:
    nearest = max(config.batch_size // num_devices, 1) * num_devices
    raise errors.ConfigError(
      f"batch_size={config.batch_size} cannot be divided over {num_devices}"
      f" devices; for example {nearest} or {nearest + num_devices} can."
    )
  groups = config.model.batch_norm_groups
  if config.batch_size % groups:
    nearest = max(config.batch_size // groups, 1) * groups
    raise errors.ConfigError(
      f"batch_size={config.batch_size} has no"
      f" model.batch_norm_groups={groups} equal parts; for example {nearest} or"
      f" {nearest + groups} has."
    )
  if config.seed + config.num_seeds > 2**32:
    raise errors.ConfigError(
      f"seed={config.seed} and num_seeds={config.num_seeds} go beyond the last"
      f" seed, {2**32 - 1}; needed: a seed of at most"
      f" {2**32 - config.num_seeds}."
    )
  steps = num_train // config.batch_size
  if config.num_epochs * steps > _LARGEST_INTEGER:
    raise errors.ConfigError(
      f"num_epochs={config.num_epochs} of {steps} steps are more steps than can"
      f" be counted; at most {_LARGEST_INTEGER // steps} are not."
    )
  if config.log_layer_norms_every and not config.log.tensorboard:
    raise errors.ConfigError(
      f"log_layer_norms_every={config.log_layer_norms_every} writes to"
      " TensorBoard, but log.tensorboard=False; set log.tensorboard=True, or"
      " log_layer_norms_every=0."
    )
  percents = tuple(config.schedule.drop_percents)
  factors = tuple(config.schedule.drop_factors)
  if len(percents) != len(factors) or percents != tuple(sorted(percents)):
    raise errors.ConfigError(
      f"schedule.drop_percents={percents} must ascend and have as many values"
      f" as schedule.drop_factors={factors}."
    )
  _check_warmup(config)
  largest = config.optimizer.learning_rate * max(factors, default=1)
  if largest >= _LARGEST_NUMBER:
    raise errors.ConfigError(
      f"optimizer.learning_rate={config.optimizer.learning_rate} times"
      f" {max(factors)} of schedule.drop_factors is a rate of {largest:g};"
      f" needed: one below {_LARGEST_NUMBER:g}."
    )


def _check_warmup(config: ConfigDict) -> None:
  """Checks that a linear warm-up is over before the rate falls."""
  epochs = config.schedule.linear_warmup_epochs
  if not epochs:
    return
  key = f"schedule.linear_warmup_epochs={epochs:g}"
  is_deep = config.model.depth >= config.schedule.warmup_min_depth
  if config.schedule.warmup_learning_rate and is_deep:
    raise errors.ConfigError(
      f"{key} and schedule.warmup_learning_rate="
      f"{config.schedule.warmup_learning_rate:g} are two warm-ups; set one of"
      " them to 0."
    )
  ends = [config.num_epochs]
  if config.schedule.name == "drops":
    ends += optim.drop_epochs(
      config.num_epochs,
      config.schedule.drop_percents,
      config.schedule.drop_inclusive,
    )
  if epochs >= min(ends):
    raise errors.ConfigError(
      f"{key} leads up to epoch {epochs:g}, but the rate falls, or the run"
      f" ends, at epoch {min(ends)}; needed: less, or more num_epochs."
    )


def _check_streaming(config: ConfigDict) -> None:
  """Checks what only sets that are decoded while training can do, or cannot."""
  if not loading.is_streamed(config.dataset.name):
    if config.augment.name in crops.RANDOM:
      raise errors.ConfigError(
        f"augment.name={config.augment.name} cuts images as they are decoded,"
        f" while training; dataset.name={config.dataset.name} has them in"
        " memory. Needed: crop_flip, shift_flip or none."
      )
    if config.dataset.test_crops != 1:
      raise errors.ConfigError(
        f"dataset.test_crops={config.dataset.test_crops} cuts images as they"
        f" are decoded; dataset.name={config.dataset.name} has them in memory."
        " Needed: 1."
      )
  elif config.normalization not in normalization.UNMEASURED:
    raise errors.ConfigError(
      f"normalization={config.normalization} is measured on all training"
      f" images, but dataset.name={config.dataset.name} is not held in memory;"
      f" needed: {', '.join(sorted(normalization.UNMEASURED))}."
    )


def check_labels(config: ConfigDict) -> None:
  """Checks that the network's head has the data set's classes.

  A network with another head can be loaded and used, but neither trained nor
  scored.

  Args:
    config: what `check` has passed.

  Raises:
    ConfigError: it has another number of classes.
  """
  classes = loading.info(config.dataset).num_classes
  if config.model.num_classes not in (0, classes):
    raise errors.ConfigError(
      f"model.num_classes={config.model.num_classes} but"
      f" dataset.name={config.dataset.name} has {classes} classes: the network"
      " can be loaded (load_model), but neither trained nor scored on these."
      " To train it with a new head, pass --config.init_from=WORKDIR and a"
      " --workdir of its own."
    )
