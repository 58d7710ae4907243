"""Reads HDF5 files: only what is in the file, and only once.

HDF5 allows links to other files, links in circles and arrays that claim any
size. Keras never writes these, so they are errors.
"""

import dataclasses
import math
import pathlib
from typing import Any, BinaryIO

import numpy as np

from resnet_flax.run import errors

# Longer than any layer's name. A limit, since names are read whole.
_LONGEST_NAME = 4096
_OPTIMIZER = ("optimizer", "optimizer_weights")
_RANDOM = "seed_generator"


@dataclasses.dataclass
class Tree:
  """The arrays of a file."""

  # float arrays by path, for example 'layers/conv2d/vars/0'.
  arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  # Paths of optimizers' and random generators' variables.
  passed_over: list[str] = dataclasses.field(default_factory=list)
  # Maps a group of 'layers', such as 'conv2d_1', to the layer's own name, if
  # the file has it.
  layer_names: dict[str, str] = dataclasses.field(default_factory=dict)
  model: str = ""  # The JSON text of the whole model, if the file holds one.


def read(path: pathlib.Path, file: BinaryIO) -> Tree:
  """Reads all weights; h5py raises any error for a damaged file.

  `path` is for messages.
  """
  with errors.extra("h5py", str(path)):
    import h5py

  def bad(key: str, what: str) -> errors.WeightsError:
    return errors.WeightsError(
      f"{path}: {key[:200]} {what}, which Keras never writes."
    )

  def array(dataset: Any, key: str) -> np.ndarray:
    if dataset.is_virtual or dataset.external:
      raise bad(key, "has its values in another file")
    shape, dtype = dataset.shape, dataset.dtype
    if shape is None or dtype.kind != "f":
      raise bad(key, f"holds {dtype}, not floating-point numbers")
    claimed = math.prod(shape) * dtype.itemsize
    stored = dataset.id.get_storage_size()
    if claimed > stored and dataset.id.get_create_plist().get_nfilters():
      raise bad(key, "is compressed (h5repack -f NONE IN OUT undoes it)")
    if claimed > stored:
      raise bad(
        key, f"claims {claimed} bytes as {list(shape)} but stores {stored}"
      )
    return np.asarray(dataset[()])

  tree = Tree()
  addresses: set[int] = set()
  links: list[tuple[str, Any]] = []
  with h5py.File(file, "r") as root:
    root.visititems_links(lambda key, link: links.append((key, link)))
    for key, link in links:
      if not isinstance(link, h5py.HardLink):
        raise bad(key, "is a link to another place or file")
      member = root[key]
      address = h5py.h5o.get_info(member.id).addr
      if address in addresses:
        raise bad(key, "is in the file under two names")
      addresses.add(address)
      if isinstance(member, h5py.Group):
        match key.split("/"):
          case ["layers", place, "vars"] if "name" in member.attrs:
            size = member.attrs.get_id("name").get_storage_size()
            if size > _LONGEST_NAME:
              raise bad(key, "has a name that is too long")
            tree.layer_names[place] = str(member.attrs["name"])
      elif not isinstance(member, h5py.Dataset):
        raise bad(key, "is neither a group nor an array")
      elif key.partition("/")[0] in _OPTIMIZER or _RANDOM in key:
        tree.passed_over.append(key)
      else:
        tree.arrays[key] = array(member, key)
    model = root.attrs.get("model_config", "")
  # Older versions of h5py wrote bytes.
  tree.model = model.decode() if isinstance(model, bytes) else str(model)
  return tree
