"""Which values each configuration key can have, checked before anything runs.

`configs/base.py` declares the keys and their defaults; this is what the
package can work with, whoever made the configuration. A test holds the two
lists of keys together.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from resnet_flax import augment, errors, metrics, normalization, optimizer
from resnet_flax.datasets import loading
from resnet_flax.models import layers, registry

Rule = Callable[[str, Any], None]

# Keys that do not change the mathematics: they may differ when a run goes on.
FREE_KEYS = (
  "eval_batch_size",
  "dataset.data_dir",
  "dataset.archive",
  "dataset.cache_dir",
  "model.remat",
  "model.scan",
  "checkpoint.every_steps",
  "checkpoint.every_minutes",
  "log.tensorboard",
  "log.interval_seconds",
)


def _wrong(key: str, value: Any, needed: str) -> errors.ConfigError:
  return errors.ConfigError(
    f"{key}={value!r} cannot be used; needed: {needed}."
  )


def _integer(low: int, high: int | None = None) -> Rule:
  needed = f"an integer from {low} " + ("up" if high is None else f"to {high}")

  def check(key: str, value: Any) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
      raise _wrong(key, value, needed)

  return check


def _number(low: float, high: float, *, above: bool = False) -> Rule:
  """A finite number in [low, high), or in (low, high) with `above`."""
  needed = f"a number {'above' if above else 'from'} {low:g}" + (
    f" and below {high:g}" if math.isfinite(high) else ""
  )

  def check(key: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
      not is_number
      or not low <= value < high
      or not math.isfinite(value)
      or (above and value == low)
    ):
      raise _wrong(key, value, needed)

  return check


def _sequence(rule: Rule) -> Rule:
  def check(key: str, value: Any) -> None:
    if not isinstance(value, tuple | list):
      raise _wrong(key, value, "a tuple, on the command line as 1,2,3")
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


def _boolean(key: str, value: Any) -> None:
  if not isinstance(value, bool):
    raise _wrong(key, value, "true or false")


def _text(key: str, value: Any) -> None:
  if not isinstance(value, str) or "\0" in value:
    raise _wrong(key, value, "a text")


_POSITIVE = _number(0, math.inf, above=True)
_NOT_NEGATIVE = _number(0, math.inf)

RULES: dict[str, Rule] = {
  "seed": _integer(0, 2**32 - 1),
  "batch_size": _integer(1),
  "num_epochs": _integer(1),
  "eval_batch_size": _integer(1),
  "normalization": _name(normalization.NAMES),
  "dataset.name": _name(loading.DATASETS),
  "dataset.data_dir": _text,
  "dataset.archive": _text,
  "dataset.cache_dir": _text,
  "dataset.train_examples": _integer(0),
  "dataset.validation_examples": _integer(0),
  "dataset.split_seed": _integer(0),
  "augment.name": _name(augment.NAMES),
  "augment.flip": _boolean,
  "model.name": _name(registry.MODELS),
  "model.depth": _integer(1),
  "model.num_filters": _integer(1),
  "model.dtype": _name(registry.DTYPES),
  "model.shortcut": _name(registry.SHORTCUTS),
  "model.padding": _name(layers.PADDINGS),
  "model.conv_bias": _boolean,
  "model.batch_norm_momentum": _number(0, 1),
  "model.batch_norm_epsilon": _POSITIVE,
  "model.remat": _boolean,
  "model.scan": _boolean,
  "optimizer.name": _name(optimizer.NAMES),
  "optimizer.learning_rate": _POSITIVE,
  "optimizer.b1": _number(0, 1),
  "optimizer.b2": _number(0, 1),
  "optimizer.epsilon": _POSITIVE,
  "optimizer.momentum": _number(0, 1),
  "optimizer.l2": _NOT_NEGATIVE,
  "optimizer.l2_weights": _name(optimizer.L2_WEIGHTS),
  "schedule.drop_percents": _sequence(_integer(1, 100)),
  "schedule.drop_factors": _sequence(_POSITIVE),
  "schedule.drop_inclusive": _boolean,
  "schedule.warmup_learning_rate": _NOT_NEGATIVE,
  "schedule.warmup_error": _number(0, 1, above=True),
  "schedule.warmup_min_depth": _integer(0),
  "plateau.enabled": _boolean,
  "plateau.factor": _number(0, 1, above=True),
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


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """A nested dictionary as {'model.depth': 20, ...}."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


def check(config: ConfigDict, num_devices: int) -> None:
  """Checks a configuration as a whole.

  Args:
    config: every key of `configs/base.py`.
    num_devices: devices that share a batch.

  Raises:
    ConfigError: the first thing that is wrong, and what would work.
  """
  flat = flatten(config.to_dict())
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

  # Constraints between keys.
  registry.create_model(config.model, num_classes=1)
  num_train = loading.num_train_examples(config.dataset)
  if config.batch_size > num_train:
    raise errors.ConfigError(
      f"batch_size={config.batch_size} is more than the {num_train} training"
      f" images; at most {num_train} makes an epoch of at least one step."
    )
  if config.batch_size % num_devices:
    nearest = max(config.batch_size // num_devices, 1) * num_devices
    raise errors.ConfigError(
      f"batch_size={config.batch_size} cannot be divided over {num_devices}"
      f" devices; for example {nearest} or {nearest + num_devices} can."
    )
  percents = tuple(config.schedule.drop_percents)
  factors = tuple(config.schedule.drop_factors)
  if len(percents) != len(factors) or percents != tuple(sorted(percents)):
    raise errors.ConfigError(
      f"schedule.drop_percents={percents} must ascend and have as many values"
      f" as schedule.drop_factors={factors}."
    )
