"""From a library's arrays to our variables: every array exactly once."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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


class Origin(NamedTuple):
  """Where one of our arrays comes from."""

  name: str  # Of the library's array.
  layout: Layout = np.asarray  # Brings it into our order of dimensions.
  back: Layout = np.asarray  # Brings ours into the library's order.


# Where our array of a path comes from.
OriginOf = Callable[[Path], Origin]


class Source:
  """A kind of network that a library has, as found in a file.

  Args:
    title: what to call it.
    num_classes: size of its head.
    origin: where our arrays come from.
    normalization: values of that key with which our network computes what
      theirs does, the recommended one first.
    model: such values of keys of `config.model`: one, or a tuple of several.
  """

  def __init__(
    self,
    title: str,
    num_classes: int,
    origin: OriginOf,
    normalization: tuple[str, ...],
    **model: Any,
  ):
    self.title, self.num_classes, self.origin = title, num_classes, origin
    self.needed = {
      f"model.{key}": value if isinstance(value, tuple) else (value,)
      for key, value in model.items()
    } | {"normalization": normalization}


def width(found: int, usual: int) -> tuple[int, ...]:
  """What `model.num_filters` can be; 0 stands for the family's usual one."""
  return (0, found) if found == usual else (found,)


def unknown(file: files.WeightsFile, known: str) -> errors.WeightsError:
  """The error for a file of none of the networks that are known."""
  some = ", ".join(sorted(file.arrays)[:5]) or "none"
  return errors.WeightsError(
    f"{file.path} is of no network that is known: {known}. It has: {some}."
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
  """For keys whose values `source` cannot have, the flag that is needed.

  Most of them change no shape: a wrong epsilon gives wrong logits.
  """
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
  wanted = {}
  for entries, leaf in leaves:
    path = tuple(entry.key for entry in entries)
    wanted[path] = source.origin(path), _shown("/".join(path), leaf), leaf.shape
  ours = {origin.name: shown for origin, shown, _ in wanted.values()}
  assert len(ours) == len(wanted), "an array would be used twice"
  theirs = {name: _shown(name, array) for name, array in file.arrays.items()}
  left_over = [theirs[name] for name in theirs if name not in ours]
  missing = [f"{name} for {ours[name]}" for name in ours if name not in theirs]
  if left_over or missing:
    raise errors.WeightsError(
      f"{file.path} ({source.title}) and the network do not have the same"
      f" arrays. Left over: {_listed(left_over)}. Missing: {_listed(missing)}."
    )
  values, wrong = [], []
  for path, (origin, shown, shape) in wanted.items():
    array = file.arrays[origin.name]
    # A layout is for the dimensions that ours has, in whatever order.
    fits = sorted(array.shape) == sorted(shape)
    value = origin.layout(array) if fits else array
    if value.shape == shape:
      values.append(_checked(file, origin.name, value, path))
    else:
      wrong.append(f"{theirs[origin.name]} for {shown}")
  if wrong:
    raise errors.WeightsError(
      f"{file.path} ({source.title}) has arrays of other shapes than the"
      f" network: {_listed(wrong)}."
    )
  return jax.tree_util.tree_unflatten(structure, values)


def _checked(
  file: files.WeightsFile, name: str, value: np.ndarray, path: Path
) -> np.ndarray:
  if value.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
    raise files.wrong_type(file.path, name, value.dtype)
  # A float64 that float32 does not hold becomes infinite, which is found here.
  with np.errstate(over="ignore"):
    value = np.ascontiguousarray(value, np.float32)
  if not np.isfinite(value).all():
    raise errors.WeightsError(
      f"{file.path}: {name} holds values that are not finite in float32."
    )
  if path[0] == "batch_stats" and path[-1] == "var" and (value < 0).any():
    raise errors.WeightsError(f"{file.path}: {name} holds negative variances.")
  return value


def _shown(name: str, array: Any) -> str:
  return f"{name}{list(array.shape)}"


def _listed(names: list[str]) -> str:
  more = len(names) - _MOST_LISTED
  rest = f" and {more} more" if more > 0 else ""
  return (", ".join(names[:_MOST_LISTED]) or "none") + rest
