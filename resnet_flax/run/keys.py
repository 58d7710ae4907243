"""Configuration keys and the values that they can have."""

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from resnet_flax.run import errors

LARGEST_INTEGER = 2**31 - 1  # The largest int32.
# Twice the largest number is still finite in float32.
LARGEST_NUMBER = 1e38
_SMALLEST_POSITIVE = 1e-37  # In float32 it is not zero.
_LONGEST_TUPLE = 100
_LONGEST_PATH = 4096


@dataclasses.dataclass(frozen=True)
class Values:
  """The values that a key can have."""

  requirement: str  # Completes the sentence "KEY=VALUE must be ...".
  accept: Callable[[Any], bool]  # Whether a value of any type is valid.
  choices: tuple[Any, ...] = ()  # The values that are listed by name.
  pattern: str = ""  # The form of other values, such as 'tfds/NAME'.


def integer(low: int, high: int = LARGEST_INTEGER) -> Values:
  """Integers in [low, high]."""
  return Values(
    f"an integer from {low} to {high}",
    lambda value: type(value) is int and low <= value <= high,
  )


def number(low: float, high: float = LARGEST_NUMBER) -> Values:
  """Numbers in [low, high), also after they are rounded to float32."""
  return Values(
    f"a number from {low:g} to below {high:g}",
    lambda value: (
      type(value) in (int, float)
      # Compared first, since NumPy cannot round every integer.
      and low <= value < high
      and bool(np.float32(low) <= np.float32(value) < np.float32(high))
    ),
  )


def positive(high: float = LARGEST_NUMBER) -> Values:
  """Numbers in (0, high), also after they are rounded to float32."""
  return number(_SMALLEST_POSITIVE, high)


def choice(*choices: Any, prefix: str = "") -> Values:
  """Listed values of one type; with a prefix also PREFIXNAME[/NAME]."""
  form = f"{prefix}NAME" if prefix else ""
  names = [*map(str, choices), *([form] if form else [])]
  pattern = rf"(?a){re.escape(prefix)}\w{{1,100}}(/[\w-]{{1,100}})?"

  def accept(value: Any) -> bool:
    if type(value) is not type(choices[0]):
      return False
    return value in choices or bool(prefix and re.fullmatch(pattern, value))

  return Values(
    f"{', '.join(names[:-1])} or {names[-1]}", accept, choices, form
  )


def tuple_of(each: Values) -> Values:
  """Tuples of `each`; also lists, since JSON turns tuples into lists."""
  return Values(
    f"a tuple (on the command line 1,2,3) of at most {_LONGEST_TUPLE} values,"
    f" each {each.requirement}",
    lambda value: (
      isinstance(value, tuple | list)
      and len(value) <= _LONGEST_TUPLE
      and all(map(each.accept, value))
    ),
  )


def _is_path(value: Any) -> bool:
  if type(value) is not str or "\0" in value:
    return False
  try:
    is_short = len(os.fsencode(value)) <= _LONGEST_PATH
    return is_short and errors.is_local(value)
  except UnicodeError:  # A lone surrogate, which has no bytes.
    return False


BOOLEAN = Values("true or false", lambda value: type(value) is bool)
PATH = Values(errors.LOCAL, _is_path)
ARGUMENTS = Values(
  "NAME=VALUE,... in Python's syntax, such as b1=0.9,nesterov=True",
  lambda value: (
    type(value) is str and len(value) <= 1000 and value.isprintable()
  ),
)
ADDRESS = Values(
  "gs://BUCKET/FOLDER, s3://BUCKET/FOLDER or a local path",
  lambda value: (
    _is_path(value)
    or (
      type(value) is str
      and re.fullmatch(r"(gs|s3)://[\w.-]+/[ -~]+", value) is not None
    )
  ),
)


@dataclasses.dataclass(frozen=True)
class Key:
  """A configuration key."""

  name: str
  default: Any
  values: Values
  # Values of its part's `name` (such as model.name) for which the program reads
  # the key; () for all. With other names it must keep its default.
  read_by: tuple[str, ...] = ()
  # Whether a run can be resumed with another value.
  may_differ: bool = False
  meaning: str = ""

  def means(self, meaning: str) -> "Key":
    """A copy of this key with this meaning."""
    return dataclasses.replace(self, meaning=meaning)

  @property
  def part(self) -> str:
    """'model' of 'model.depth', and 'run' for keys without a part."""
    return self.name.rpartition(".")[0] or "run"

  def check(self, value: Any) -> None:
    """Raises a `ConfigError` if the key cannot have this value."""
    if self.values.accept(value):
      return
    choices = self.values.choices
    if isinstance(value, str) and choices and isinstance(choices[0], str):
      known = [*choices, *filter(None, [self.values.pattern])]
      raise errors.unknown_name(self.name, value, known)
    try:
      shown = repr(value)
    # An integer of thousands of digits, or a config file's own type.
    except Exception:
      shown = f"({type(value).__name__})"
    shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
    raise errors.ConfigError(
      f"{self.name}={shown} must be {self.values.requirement}."
    )


# ---- Names


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """A nested dictionary as {'model.depth': 20, ...}."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    is_part = isinstance(value, Mapping)
    flat |= (
      flatten(value, f"{prefix}{key}.") if is_part else {prefix + key: value}
    )
  return flat


def to_flat(config: ConfigDict) -> dict[str, Any]:
  """A configuration as {'model.depth': 20, ...}."""
  try:
    return flatten(config.to_dict())
  # A config file's placeholders and references are computed only here.
  except Exception as error:
    raise errors.ConfigError(
      f"the configuration cannot be read: {errors.one_line(error)}."
    ) from error


# Names that other programs give to these keys.
_OTHER_NAMES = {
  "lr": "optimizer.learning_rate",
  "wd": "optimizer.weight_decay",
  "width": "model.num_filters",
  "arch": "model.name",
  "optim": "optimizer.name",
  "dataset": "dataset.name",
}


def nearest_keys(name: str, keys: Iterable[str]) -> list[str]:
  """At most three keys that a wrong name may mean, the nearest first."""
  last_part = name.lower().rpartition(".")[2]
  if last_part in _OTHER_NAMES:
    return [_OTHER_NAMES[last_part]]

  def likeness(key: str) -> float:
    pairs = [(name, key), (last_part, key.rpartition(".")[2])]
    return max(difflib.SequenceMatcher(None, *p).ratio() for p in pairs)

  key_likenesses = {key: likeness(key) for key in keys}
  least = max(0.6, max(key_likenesses.values()) - 0.1)
  near = [key for key in key_likenesses if key_likenesses[key] >= least]
  return sorted(near, key=lambda key: -key_likenesses[key])[:3]


def unknown_key(name: str, keys: Iterable[str]) -> errors.ConfigError:
  """The error for an unknown key; suggests the nearest known ones."""
  short = name if len(name) <= 100 else f"{name[:100]}..."
  near = " or ".join(map(repr, nearest_keys(short, keys)))
  hint = f" Did you mean {near}?" if near else ""
  return errors.ConfigError(
    f"config key={short!r} is not known.{hint} --help=WORD finds keys by a word"
    " of their meaning."
  )
