"""Maps a library's arrays to our variables; uses every array exactly once."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_flax.run import errors, keys
from resnet_flax.tools.weights import files

# Path of our array: ('params', 'stage1_block1', 'conv1', 'kernel').
Path = tuple[str, ...]

# The most names of one kind, left over or missing, that an error lists.
_MOST_LISTED = 30


class Origin(NamedTuple):
  """The library's array that holds one of ours."""

  name: str
  # A view of our array with its axes in the library's order. The library's
  # values fill our array through this view.
  view: Callable[[np.ndarray], np.ndarray] = np.asarray

  def to_library(self, ours: np.ndarray) -> np.ndarray:
    """Our array in the library's layout."""
    view = self.view(ours)
    # A dense kernel has two axes, even if it sees all pixels of each channel.
    return view.reshape(len(view), -1) if ours.ndim == 2 else view


# Maps the path of our array to its origin.
OriginOf = Callable[[Path], Origin]


class Source:
  """A library's network, as found in a file, and where our arrays come from.

  Their network was trained with one of the `normalization`s, most likely the
  first, and needs this one here. `model` has the values that keys of
  `config.model` must have: a key has one value or a tuple of allowed values.
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


def allowed_widths(found: int, usual: int) -> tuple[int, ...]:
  """Allowed values of a key for a width; 0 stands for the `usual` width."""
  return (0, found) if found == usual else (found,)


def unknown_network(file: files.WeightsFile, known: str) -> errors.WeightsError:
  """The error for a file that holds no known network."""
  some = ", ".join(sorted(file.arrays)[:5]) or "none"
  return errors.WeightsError(
    f"{file.path} must hold a known network: {known}. It has: {some}."
  )


# Values that our own options must have, unless a `Source` needs others.
_OURS_ALONE: dict[str, tuple[Any, ...]] = {
  "model.squeeze_excitation": (0,),
  "model.stochastic_depth": (0.0,),
  "model.weight_standardization": (False,),
  "model.norm": ("batch_norm",),
  "model.groups": (0, 1),
  "model.group_width": (0,),
}


def differing(source: Source, config: ConfigDict) -> dict[str, str]:
  """Maps each key whose value does not fit `source` to the flag to pass.

  Most of these keys change no shape: a wrong epsilon only gives wrong logits.
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
  """The file's values in the tree of `like`, as float32 arrays.

  `like` is {'params': ..., 'batch_stats': ...} of `jax.ShapeDtypeStruct`s.
  Raises `WeightsError` if arrays are left over, missing or of another shape, or
  hold values that no trained network has.
  """
  values = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), like)
  leaves = jax.tree.leaves_with_path(values)
  # Maps the name and shape that the file must have to our path and a view.
  needed = {}
  for entries, value in leaves:
    path = tuple(entry.key for entry in entries)
    origin = source.origin(path)
    shape = origin.to_library(np.broadcast_to(0, value.shape)).shape
    needed[origin.name, shape] = path, origin.view(value)
  assert len(needed) == len(leaves), "an array would be used twice"
  stored = {(name, array.shape) for name, array in file.arrays.items()}
  left_over = [f"{n}{[*shape]}" for n, shape in sorted(stored - needed.keys())]
  missing = [
    f"{name}{[*shape]} for {'/'.join(path)}"
    for (name, shape), (path, _) in needed.items()
    if (name, shape) not in stored
  ]
  if left_over or missing:
    raise errors.WeightsError(
      f"{file.path} ({source.title}) and the network must have the same"
      f" arrays. Left over: {_listed(left_over)}. Missing: {_listed(missing)}."
    )
  for (name, _), (path, view) in needed.items():
    view[...] = _checked(file, name, path).reshape(view.shape)
  return values


def _checked(file: files.WeightsFile, name: str, path: Path) -> np.ndarray:
  what, value = f"{file.path}: {name}", file.arrays[name]
  if value.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
    raise files.wrong_type(file.path, name, value.dtype)
  # A float64 too large for float32 becomes infinite; the next check finds it.
  with np.errstate(over="ignore"):
    value = np.asarray(value, np.float32)
  if not np.isfinite(value).all():
    raise errors.WeightsError(
      f"{what} must hold numbers that are finite in float32. The file is"
      " damaged, or its training diverged: pass another."
    )
  if path[0] == "batch_stats" and path[-1] == "var" and (value < 0).any():
    raise errors.WeightsError(f"{what} must hold variances of at least 0.")
  return value


def _listed(names: list[str]) -> str:
  more = len(names) - _MOST_LISTED
  rest = f" and {more} more" if more > 0 else ""
  return (", ".join(names[:_MOST_LISTED]) or "none") + rest
