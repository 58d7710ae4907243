"""Files of weights, as flat dictionaries of arrays; no code in them is run."""

import dataclasses
import io
import json
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from resnet_flax import errors
from resnet_flax.weights import hdf5

# What a file may hold besides weights.
_COUNTER = "num_batches_tracked"
# Where training scripts put the state dict.
_STATE_DICT_KEYS = ("state_dict", "model")
_PARALLEL_PREFIX = "module."

# How many times larger than its archive a member may be: float32 weights hardly
# shrink, and what is larger is there to fill the memory.
_MOST_GROWTH = 16

_SIGNATURES = {
  b"\x89HDF\r\n\x1a\n": "an HDF5 file",
  b"PK\x03\x04": "a zip archive",
  b"\x80": "a pickle",
  b"\x1f\x8b": "a gzip file",
  b"version https://git-lfs": "a pointer of Git LFS",
  b"<": "a web page",
}


@dataclasses.dataclass(frozen=True)
class WeightsFile:
  """What a file holds.

  Attributes:
    path: the file.
    library: 'pytorch' or 'keras', whose names the arrays have.
    arrays: by name; 'layer1.0.conv1.weight' in PyTorch, 'conv2d_3/kernel' in
      Keras.
    passed_over: what is no weight: PyTorch's counters, the variables of Keras's
      optimizers and random generators.
    has_layer_names: False for files of older Keras 3, where layers are only
      numbered in the order of `model.layers`, apart for each class.
  """

  path: pathlib.Path
  library: str
  arrays: Mapping[str, np.ndarray]
  passed_over: tuple[str, ...]
  has_layer_names: bool = True


def read(path: pathlib.Path) -> WeightsFile:
  """Reads a file of weights; its extension says which kind it is.

  Args:
    path: .safetensors, .pt, .pth or .th with PyTorch's names; .keras,
      .weights.h5 or .h5 of Keras.

  Raises:
    WeightsError: it is no such file, is damaged, holds code or more than it
      has room for, or needs a library that is not installed.
  """
  if path.suffix not in _READERS:
    raise errors.WeightsError(
      f"{path}: unknown extension {path.suffix!r}; known:"
      f" {', '.join(sorted(_READERS))}."
    )
  try:
    with path.open("rb") as file:
      start = file.read(64)
  except OSError as error:
    raise errors.WeightsError(
      f"{path} cannot be read: {error.strerror}. Pass the file of weights with"
      " --source."
    ) from error
  reader, signatures = _READERS[path.suffix]
  found = next((k for k in _SIGNATURES if start.startswith(k)), None)
  if signatures and found not in signatures or not signatures and found:
    what = _SIGNATURES[found] if found else "something else"
    raise errors.WeightsError(
      f"{path} is not what its extension says: it is {what}."
      if start
      else f"{path} is empty."
    )
  try:
    return reader(path)
  except errors.UserError:
    raise
  # The libraries raise many kinds, according to what is wrong.
  except Exception as error:
    raise errors.WeightsError(
      f"{path} is damaged, or is not what its extension says:"
      f" {errors.one_line(error)}."
    ) from error


def _read_safetensors(path: pathlib.Path) -> WeightsFile:
  from safetensors import numpy as safetensors_numpy

  return _pytorch(path, safetensors_numpy.load_file(path))


def _read_torch(path: pathlib.Path) -> WeightsFile:
  try:
    import torch
  except ImportError:
    raise errors.WeightsError(
      f"{path} can be read only with PyTorch, which is not installed: pip"
      " install 'resnet_flax[torch]'. Or save it where PyTorch is with"
      " safetensors.torch.save_file(state_dict, 'weights.safetensors')."
    ) from None
  try:
    # Anything but tensors and plain containers is refused.
    loaded = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:
    # PyTorch's own text is long and explains how to run the code.
    raise errors.WeightsError(
      f"{path} is damaged, or holds more than tensors, which is not loaded"
      f" since it could run code ({type(error).__name__}). Save the state dict"
      " alone: torch.save(model.state_dict(), PATH)."
    ) from error
  for key in _STATE_DICT_KEYS:
    if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
      loaded = loaded[key]
      break
  is_state_dict = isinstance(loaded, Mapping) and all(
    isinstance(value, torch.Tensor) for value in loaded.values()
  )
  if not is_state_dict:
    raise errors.WeightsError(
      f"{path} holds no state dict: needed is a dictionary of tensors, or one"
      f" that has it as {' or '.join(map(repr, _STATE_DICT_KEYS))}."
    )
  return _pytorch(
    path, {str(name): _to_numpy(path, name, t) for name, t in loaded.items()}
  )


def _to_numpy(path: pathlib.Path, name: Any, tensor: Any) -> np.ndarray:
  import torch

  if tensor.layout != torch.strided or tensor.is_quantized:
    raise errors.WeightsError(
      f"{path}: {name} is sparse or quantized; needed: plain tensors."
    )
  stored = tensor.untyped_storage().nbytes()
  if tensor.numel() * tensor.element_size() > stored:
    raise errors.WeightsError(
      f"{path}: {name} claims the shape {list(tensor.shape)} but has {stored}"
      " bytes."
    )
  if tensor.dtype == torch.bfloat16:
    tensor = tensor.float()
  return tensor.detach().numpy()


def _pytorch(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray]
) -> WeightsFile:
  if arrays and all(name.startswith(_PARALLEL_PREFIX) for name in arrays):
    # DataParallel wraps the network.
    prefix = len(_PARALLEL_PREFIX)
    arrays = {name[prefix:]: array for name, array in arrays.items()}
  counters = [
    name for name in arrays if name.rpartition(".")[2] == _COUNTER
  ]
  weights = {k: v for k, v in arrays.items() if k not in set(counters)}
  return WeightsFile(path, "pytorch", weights, tuple(counters))


def _read_keras(path: pathlib.Path) -> WeightsFile:
  with zipfile.ZipFile(path) as archive:
    weights = _member(path, archive, "model.weights.h5")
    config = json.loads(_member(path, archive, "config.json"))
  tree = hdf5.read(path, io.BytesIO(weights))
  return _keras(path, tree, _layer_names(config))


def _member(
  path: pathlib.Path, archive: zipfile.ZipFile, name: str
) -> bytes:
  try:
    info = archive.getinfo(name)
  except KeyError:
    raise errors.WeightsError(
      f"{path} is no .keras file: it has no {name}."
    ) from None
  if info.file_size > _MOST_GROWTH * path.stat().st_size:
    raise errors.WeightsError(
      f"{path}: {name} claims {info.file_size} bytes, more than"
      f" {_MOST_GROWTH} times the whole file."
    )
  return archive.read(info)


def _read_hdf5(path: pathlib.Path) -> WeightsFile:
  with path.open("rb") as file:
    return _keras(path, hdf5.read(path, file), {})


def _keras(
  path: pathlib.Path, tree: hdf5.Tree, layer_names: Mapping[str, str]
) -> WeightsFile:
  """Gives the arrays of both of Keras's layouts the same names."""
  names = {**layer_names, **tree.layer_names}
  arrays: dict[str, np.ndarray] = {}
  has_layer_names = True
  for key, array in tree.arrays.items():
    layer, variable = _layer_and_variable(key)
    if key.startswith("layers/"):
      has_layer_names &= layer in names
      layer = names.get(layer, layer)
    name = f"{layer}/{variable}"
    if name in arrays:
      raise errors.WeightsError(f"{path} has two layers of the name {layer}.")
    arrays[name] = array
  return WeightsFile(
    path, "keras", arrays, tree.passed_over, has_layer_names
  )


# Keras 3 numbers the variables of a layer in the order they are made in.
_VARIABLES = {
  "conv2d": ("kernel", "bias"),
  "dense": ("kernel", "bias"),
  "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
}


def layer_class(name: str) -> str:
  """'conv2d' of 'conv2d_7': an automatic name without its number."""
  return re.sub(r"_\d+$", "", name)


def _layer_and_variable(key: str) -> tuple[str, str]:
  parts = key.split("/")
  if parts[0] != "layers":
    # The legacy layout: model_weights/conv1/[more/]conv1/kernel:0.
    parts = parts[1:] if parts[0] == "model_weights" else parts
    return parts[0], parts[-1].removesuffix(":0")
  # layers/conv2d_7/vars/0
  if len(parts) == 4 and parts[2] == "vars" and parts[3].isdecimal():
    variables = _VARIABLES.get(layer_class(parts[1]), ())
    number = int(parts[3][:3])
    if number < len(variables):
      return parts[1], variables[number]
  return parts[1], "/".join(parts[2:])


def _layer_names(config: Any) -> dict[str, str]:
  """For a layer's place in the file, its name in config.json."""
  classes = {
    "Conv2D": "conv2d",
    "Dense": "dense",
    "BatchNormalization": "batch_normalization",
  }
  counts = dict.fromkeys(classes, 0)
  names = {}
  for layer in config["config"]["layers"]:
    kind = layer["class_name"]
    if kind in classes:
      count, counts[kind] = counts[kind], counts[kind] + 1
      key = classes[kind] + (f"_{count}" if count else "")
      names[key] = str(layer["config"]["name"])
  return names


_READERS: dict[str, tuple[Any, tuple[bytes, ...]]] = {
  ".safetensors": (_read_safetensors, ()),
  **dict.fromkeys(
    (".pt", ".pth", ".th"), (_read_torch, (b"PK\x03\x04", b"\x80"))
  ),
  ".keras": (_read_keras, (b"PK\x03\x04",)),
  **dict.fromkeys(
    (".h5", ".hdf5"), (_read_hdf5, (b"\x89HDF\r\n\x1a\n",))
  ),
}
