"""From a library's arrays to our variables: every array exactly once."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_flax.run import errors, keys
from resnet_flax.tools.weights import files

# Of ours: ('params', 'stage1_block1', 'conv1', 'kernel').
Path = tuple[str, ...]
Layout = Callable[[np.ndarray], np.ndarray]

# How many names an error lists of those that are left over, and of the others.
_MOST_LISTED = 30


def as_it_is(array: np.ndarray) -> np.ndarray:
  """The layout of what both sides keep in the same order."""
  return array


def width(found: int, usual: int) -> tuple[int, ...]:
  """What `model.num_filters` can be; 0 stands for the family's usual one."""
  return (0, found) if found == usual else (found,)


def shape_of(file: files.WeightsFile, name: str) -> tuple[int, ...]:
  """The shape of an array of the file; (0,) if it has none."""
  shape = file.arrays[name].shape if name in file.arrays else ()
  return shape or (0,)


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where one of our arrays comes from."""

  name: str  # Of the library's array.
  layout: Layout = as_it_is  # Brings it into our order of dimensions.
  back: Layout | None = None  # Brings ours into its order; None: as `layout`.


# Where our array of a path comes from.
OriginOf = Callable[[Path], Origin]


@dataclasses.dataclass(frozen=True)
class Source:
  """A kind of network that a library has, as found in a file."""

  title: str  # What to call it.
  # For keys of the configuration the values, the first of which is recommended,
  # with which our network computes what theirs does.
  needed: Mapping[str, tuple[Any, ...]]
  num_classes: int  # Size of its head.
  origin: OriginOf


def check_config(
  file: files.WeightsFile, source: Source, config: ConfigDict
) -> None:
  """Checks that our network computes what the file's does.

  Most of it shapes cannot show: a wrong epsilon gives wrong logits.

  Raises:
    ConfigError: it does not; names the values that are needed.
  """
  if wrong := differing(source, config):
    raise errors.ConfigError(
      f"{file.path} holds {source.title}, of which the configuration is not:"
      f" needed are {', '.join(wrong.values())}."
    )


# What networks of other libraries do not have, unless they say so.
_OURS_ALONE: dict[str, tuple[Any, ...]] = {
  "model.squeeze_excitation": (0,),
  "model.stochastic_depth": (0.0,),
  "model.weight_standardization": (False,),
  "model.norm": ("batch_norm",),
  "model.groups": (0, 1),
  "model.group_width": (0,),
}


def differing(source: Source, config: ConfigDict) -> dict[str, str]:
  """For keys whose values `source` cannot have, the flag that is needed."""
  flat = keys.to_flat(config)
  return {
    key: f"--config.{key}={_flag(allowed[0])} (now {_flag(flat[key])})"
    for key, allowed in (_OURS_ALONE | dict(source.needed)).items()
    if flat[key] not in allowed
  }


def _flag(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)


def variables(
  file: files.WeightsFile, source: Source, like: Mapping[str, Any]
) -> dict[str, Any]:
  """Our variables with the file's values.

  Args:
    file: the arrays.
    source: what they are of.
    like: {'params': ..., 'batch_stats': ...} of `jax.ShapeDtypeStruct`s.

  Returns:
    float32 arrays in the tree of `like`.

  Raises:
    WeightsError: arrays of the file are left over, are missing, have another
      shape, or hold what no trained network does.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(like)
  wanted = []
  for entries, leaf in leaves:
    path = tuple(str(entry.key) for entry in entries)
    wanted.append((source.origin(path), path, leaf))
  _check_one_to_one(file, source, wanted)
  values = []
  wrong = []
  for origin, path, leaf in wanted:
    array = file.arrays[origin.name]
    # A layout is for as many dimensions as ours has.
    value = origin.layout(array) if array.ndim == leaf.ndim else array
    if value.shape == leaf.shape:
      values.append(_checked(file, origin, path, value))
    else:
      wrong.append(
        f"{_shown(origin.name, array)} for {_shown('/'.join(path), leaf)}"
      )
  if wrong:
    raise errors.WeightsError(
      f"{file.path} ({source.title}) has arrays of other shapes than the"
      f" network: {_listed(wrong)}."
    )
  return jax.tree_util.tree_unflatten(structure, values)


def _check_one_to_one(
  file: files.WeightsFile,
  source: Source,
  wanted: list[tuple[Origin, Path, Any]],
) -> None:
  names = {origin.name for origin, _, _ in wanted}
  assert len(names) == len(wanted), "an array would be used twice"
  left_over = [
    _shown(name, array)
    for name, array in file.arrays.items()
    if name not in names
  ]
  missing = [
    f"{origin.name} for {_shown('/'.join(path), leaf)}"
    for origin, path, leaf in wanted
    if origin.name not in file.arrays
  ]
  if left_over or missing:
    raise errors.WeightsError(
      f"{file.path} ({source.title}) and the network do not have the same"
      f" arrays. Left over: {_listed(left_over)}. Missing: {_listed(missing)}."
    )


def _checked(
  file: files.WeightsFile, origin: Origin, path: Path, value: np.ndarray
) -> np.ndarray:
  if value.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
    raise files.wrong_type(file.path, origin.name, value.dtype)
  # A float64 that float32 does not hold becomes infinite, which is found here.
  with np.errstate(over="ignore"):
    value = np.ascontiguousarray(value, np.float32)
  if not np.isfinite(value).all():
    raise errors.WeightsError(
      f"{file.path}: {origin.name} holds values that are not finite in float32."
    )
  if path[0] == "batch_stats" and path[-1] == "var" and (value < 0).any():
    raise errors.WeightsError(
      f"{file.path}: {origin.name} holds negative variances."
    )
  return value


def _shown(name: str, array: Any) -> str:
  return f"{name}{list(array.shape)}"


def _listed(names: list[str]) -> str:
  if not names:
    return "none"
  more = len(names) - _MOST_LISTED
  return ", ".join(names[:_MOST_LISTED]) + (f" and {more} more" * (more > 0))
