"""Reads HDF5 files of strangers: only what is in the file, only once.

HDF5 has links to other files, links in circles and arrays that claim to be
larger than anything; none of it occurs in what Keras writes.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from resnet_flax import errors

# Deeper than any model nests layers.
_DEEPEST = 16
# Longer than any layer's name; names are read whole.
_LONGEST_NAME = 4096

_OPTIMIZER = ("optimizer", "optimizer_weights")
_RANDOM = "seed_generator"


@dataclasses.dataclass(frozen=True)
class Tree:
  """The arrays of a file.

  Attributes:
    arrays: float arrays by path, for example 'layers/conv2d/vars/0'.
    passed_over: paths of optimizers' and random generators' variables.
    layer_names: for the group 'conv2d_1' of 'layers' the layer's own name,
      where the file tells.
    model: the JSON text of the whole model, if the file holds one.
  """

  arrays: Mapping[str, np.ndarray]
  passed_over: tuple[str, ...]
  layer_names: Mapping[str, str]
  model: str


def read(path: pathlib.Path, file: BinaryIO) -> Tree:
  """Reads all weights.

  Args:
    path: what errors call the file.
    file: open for reading.

  Raises:
    WeightsError: something in the file is not as Keras writes it.
    Exception: whatever h5py raises where the file is damaged.
  """
  import h5py

  walk = _Walk(path)
  with h5py.File(file, "r") as root:
    walk.group(root, "", 0)
    model = root.attrs.get("model_config", "")
  # Older versions of h5py wrote bytes.
  model = model.decode() if isinstance(model, bytes) else str(model)
  return Tree(walk.arrays, tuple(walk.passed_over), walk.layer_names, model)


class _Walk:
  """What has been found on the way through a file."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._seen: set[int] = set()
    self.arrays: dict[str, np.ndarray] = {}
    self.passed_over: list[str] = []
    self.layer_names: dict[str, str] = {}

  def group(self, group: Any, prefix: str, depth: int) -> None:
    import h5py

    if depth > _DEEPEST:
      raise self._bad(prefix, f"is nested deeper than {_DEEPEST} groups")
    for name in group:
      key = f"{prefix}{name}"
      if group.get(name, getclass=True, getlink=True) is not h5py.HardLink:
        raise self._bad(key, "is a link to another place or file")
      member = group[name]
      address = h5py.h5o.get_info(member.id).addr
      if address in self._seen:
        raise self._bad(key, "is in the file under two names")
      self._seen.add(address)
      if isinstance(member, h5py.Group):
        self._note_layer_name(member, key)
        self.group(member, f"{key}/", depth + 1)
      elif not isinstance(member, h5py.Dataset):
        raise self._bad(key, "is neither a group nor an array")
      elif key.partition("/")[0] in _OPTIMIZER or _RANDOM in key:
        self.passed_over.append(key)
      else:
        self.arrays[key] = self._array(member, key)

  def _array(self, dataset: Any, key: str) -> np.ndarray:
    if dataset.is_virtual or dataset.external:
      raise self._bad(key, "has its values in another file")
    shape, dtype = dataset.shape, dataset.dtype
    if shape is None or dtype.kind != "f":
      raise self._bad(key, f"holds {dtype}; needed: numbers with a fraction")
    claimed = math.prod(shape) * dtype.itemsize
    stored = dataset.id.get_storage_size()
    if claimed > stored:
      raise self._bad(
        key, f"claims {claimed} bytes as {list(shape)} but stores {stored}"
      )
    return np.asarray(dataset[()])

  def _note_layer_name(self, group: Any, key: str) -> None:
    parts = key.split("/")
    if len(parts) != 3 or parts[0] != "layers" or parts[2] != "vars":
      return
    if "name" not in group.attrs:
      return
    if group.attrs.get_id("name").get_storage_size() > _LONGEST_NAME:
      raise self._bad(key, "has a name that is too long")
    self.layer_names[parts[1]] = str(group.attrs["name"])

  def _bad(self, key: str, what: str) -> errors.WeightsError:
    return errors.WeightsError(
      f"{self._path}: {key[:200]} {what}, which Keras never writes."
    )
