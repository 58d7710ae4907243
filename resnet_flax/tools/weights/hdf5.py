"""Reads untrusted HDF5 files: only what is in the file, and only once.

HDF5 allows links to other files, links in circles and arrays that claim any
size. Keras never writes these, so they are errors. A few wrong bytes can make
the HDF5 library loop forever. So a separate process, which can be killed, reads
the file and hands over what it found.

  python -m resnet_flax.tools.weights.hdf5 FILE ARRAYS
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, BinaryIO

import numpy as np

from resnet_flax.run import errors

# Longer than any layer's name. A limit, since names are read whole.
_LONGEST_NAME = 4096

# The time limit of a file, much longer than a good file needs.
_SECONDS = 30.0
_SECONDS_PER_BYTE = 1e-7
# The memory limit in bytes, besides the arrays and their copies.
_MEMORY = 2**29
_COPIES = 3

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


def read_apart(path: pathlib.Path, content: pathlib.Path) -> Tree:
  """Reads all weights in a separate process."""
  from safetensors import numpy as safetensors_numpy

  root = pathlib.Path(__file__).parents[3]
  limit = _SECONDS + _SECONDS_PER_BYTE * content.stat().st_size
  with tempfile.TemporaryDirectory() as folder:
    arrays = pathlib.Path(folder) / "arrays.safetensors"
    try:
      process = subprocess.run(
        [sys.executable, "-m", __name__, content.absolute(), arrays],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=limit,
      )
    except subprocess.TimeoutExpired:
      raise errors.WeightsError(
        f"{path} is damaged: the HDF5 library had not read it after"
        f" {limit:.0f} s."
      ) from None
    if process.returncode:
      raise errors.WeightsError(
        f"{path} is damaged: the HDF5 library ended with status"
        f" {process.returncode}."
      )
    rest = json.loads(process.stdout)
    if "error" in rest:
      raise errors.WeightsError(f"{path}{rest['error']}")
    return Tree(safetensors_numpy.load_file(arrays), **rest)


def _hand_over(content: pathlib.Path, arrays: pathlib.Path) -> None:
  """The separate process: writes the arrays and prints the rest as JSON."""
  from safetensors import numpy as safetensors_numpy

  try:
    with content.open("rb") as file:
      _limit_memory(content.stat().st_size)
      rest = dict(vars(read(file)))
    safetensors_numpy.save_file(rest.pop("arrays"), arrays)
  except errors.WeightsError as error:
    rest = {"error": str(error)}
  # h5py raises many kinds of errors.
  except Exception as error:
    rest = {"error": f" is damaged: {errors.one_line(error)}."}
  print(json.dumps(rest))


def _limit_memory(size: int) -> None:
  """Limits the memory that a file's claims can take, where the system can."""
  with contextlib.suppress(ImportError, OSError, ValueError):
    import resource

    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY + _COPIES * size
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def read(file: BinaryIO) -> Tree:
  """Reads all weights; h5py raises any error for a damaged file.

  The message of a `WeightsError` must follow the file's name.
  """
  try:
    import h5py
  except ImportError:
    message = " needs h5py: pip install 'resnet_flax[h5py]'."
    raise errors.WeightsError(message) from None
  tree = Tree()
  addresses: set[int] = set()
  links: list[tuple[str, Any]] = []
  with h5py.File(file, "r") as root:
    root.visititems_links(lambda key, link: links.append((key, link)))
    for key, link in links:
      if not isinstance(link, h5py.HardLink):
        raise _bad(key, "is a link to another place or file")
      member = root[key]
      address = h5py.h5o.get_info(member.id).addr
      if address in addresses:
        raise _bad(key, "is in the file under two names")
      addresses.add(address)
      if isinstance(member, h5py.Group):
        match key.split("/"):
          case ["layers", place, "vars"] if "name" in member.attrs:
            size = member.attrs.get_id("name").get_storage_size()
            if size > _LONGEST_NAME:
              raise _bad(key, "has a name that is too long")
            tree.layer_names[place] = str(member.attrs["name"])
      elif not isinstance(member, h5py.Dataset):
        raise _bad(key, "is neither a group nor an array")
      elif key.partition("/")[0] in _OPTIMIZER or _RANDOM in key:
        tree.passed_over.append(key)
      else:
        tree.arrays[key] = _array(member, key)
    model = root.attrs.get("model_config", "")
  # Older versions of h5py wrote bytes.
  tree.model = model.decode() if isinstance(model, bytes) else str(model)
  return tree


def _array(dataset: Any, key: str) -> np.ndarray:
  if dataset.is_virtual or dataset.external:
    raise _bad(key, "has its values in another file")
  shape, dtype = dataset.shape, dataset.dtype
  if shape is None or dtype.kind != "f":
    raise _bad(key, f"holds {dtype}, not floating-point numbers")
  claimed = math.prod(shape) * dtype.itemsize
  stored = dataset.id.get_storage_size()
  if claimed > stored and dataset.id.get_create_plist().get_nfilters():
    raise _bad(key, "is compressed (h5repack -f NONE IN OUT undoes it)")
  if claimed > stored:
    raise _bad(
      key, f"claims {claimed} bytes as {list(shape)} but stores {stored}"
    )
  return np.asarray(dataset[()])


def _bad(key: str, what: str) -> errors.WeightsError:
  return errors.WeightsError(f": {key[:200]} {what}, which Keras never writes.")


if __name__ == "__main__":
  _hand_over(*map(pathlib.Path, sys.argv[1:]))
