"""Reads files of weights as flat dictionaries; never runs code in a file."""

import contextlib
import io
import itertools
import json
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from resnet_flax.run import errors
from resnet_flax.tools.weights import hdf5

# Counters of batch norms and of `AveragedModel`, which are not weights.
_COUNTERS = ("num_batches_tracked", "n_averaged")
# Keys under which training scripts save the state dict.
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net")
# Prefixes that DataParallel, `torch.compile` and Lightning give all names.
_WRAPPERS = re.compile(r"((?:module\.|_orig_mod\.|model\.)*)")
# Older versions can run code in spite of weights_only (CVE-2025-32434).
_LEAST_TORCH = (2, 6)

# A member may be so many times larger than its archive. Float32 weights hardly
# shrink, so a larger member is there to fill the memory.
_MOST_GROWTH = 16

# Kinds of files, by their first bytes.
_SIGNATURES = {
  b"\x89HDF\r\n\x1a\n": "an HDF5 file",
  b"PK\x03\x04": "a zip archive",
  b"\x80": "a pickle",
  b"\x1f\x8b": "a gzip file",
  b"version https://git-lfs": "a pointer of Git LFS",
  b"<": "a web page",
}


class WeightsFile(NamedTuple):
  """The arrays of a file, and its description of the layers."""

  path: pathlib.Path  # The file.
  library: str  # 'pytorch' or 'keras': the arrays have its names.
  # By name: 'layer1.0.conv1.weight' in PyTorch, 'conv2d_3/kernel' in Keras.
  arrays: Mapping[str, np.ndarray]
  # Names of arrays that are not weights: PyTorch's counters, and variables of
  # Keras's optimizers and random generators.
  passed_over: tuple[str, ...]
  # False for files of older Keras 3: they only number the layers of each class
  # in the order of `model.layers`.
  has_layer_names: bool = True
  # The layers of a whole Keras model, in the order of `model.layers`: each with
  # class_name and config, which has the name. Empty if a file has only weights.
  layers: Sequence[dict[str, Any]] = ()

  @property
  def num_convs(self) -> int:
    """The number of convolutions, counted by their kernels."""
    return sum(array.ndim == 4 for array in self.arrays.values())

  def shape(self, name: str) -> tuple[int, ...]:
    """The shape of an array; (0,) if it is missing or a scalar."""
    return getattr(self.arrays.get(name), "shape", ()) or (0,)


def read(path: pathlib.Path) -> WeightsFile:
  """Reads a file of weights; its extension gives its kind.

  Of PyTorch .safetensors, .pt, .pth, .th, .pth.tar, .bin and .ckpt; of Keras
  .keras, .weights.h5 and .h5. A `WeightsError` if it is damaged, holds code or
  claims more than it stores; a `ConfigError` if its library is not installed.
  """
  extension = path.suffix.lower()
  if path.name.lower().endswith(".pth.tar"):  # It is not a tar archive.
    extension = ".pth"
  if extension not in _READERS:
    raise errors.WeightsError(
      f"{path} has the extension {path.suffix!r}, which must be one of"
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
  reader, right_start = _READERS[extension]
  if not re.match(right_start, start, re.DOTALL):
    known = [
      text for sign, text in _SIGNATURES.items() if start.startswith(sign)
    ]
    what = (known or ["something else" if start else "empty"])[0]
    raise errors.WeightsError(
      f"{path} is not what its extension says: it is {what}."
    )
  with explain(f"{path} is damaged, or is not what its extension says"):
    return reader(path)


@contextlib.contextmanager
def explain(fault: str, advice: str = "") -> Iterator[None]:
  """Turns any error of a library into a `WeightsError` that names the fault."""
  try:
    yield
  except errors.UserError:
    raise
  except Exception as error:
    raise errors.WeightsError(
      f"{fault}: {errors.one_line(error)}.{advice}"
    ) from error


def wrong_type(
  path: pathlib.Path, name: str, dtype: Any
) -> errors.WeightsError:
  """The error for an array whose dtype is not that of weights."""
  return errors.WeightsError(
    f"{path}: {name} is {dtype}; it must be float32, float16, bfloat16 or"
    " float64."
  )


def _read_safetensors(path: pathlib.Path) -> WeightsFile:
  import safetensors

  arrays = {}
  with safetensors.safe_open(path, framework="np") as file:
    for name in file.keys():  # noqa: SIM118 It cannot be iterated over.
      try:
        arrays[name] = file.get_tensor(name)
      except AttributeError:  # NumPy lacks the type.
        dtype = file.get_slice(name).get_dtype()
        raise wrong_type(path, name, dtype) from None
  # `resnet_flax.export` writes Keras's names so; PyTorch's names have dots.
  if all("/" in name for name in arrays):
    return WeightsFile(path, "keras", arrays, ())
  return _pytorch(path, arrays)


def _read_torch(path: pathlib.Path) -> WeightsFile:
  with errors.extra(
    "torch",
    str(path),
    " Or save it with PyTorch elsewhere:"
    " safetensors.torch.save_file(state_dict, 'weights.safetensors').",
  ):
    import torch
  version = re.match(r"(\d{1,4})\.(\d{1,4})", torch.__version__)
  if version is None or tuple(map(int, version.groups())) < _LEAST_TORCH:
    raise errors.WeightsError(
      f"{path} needs PyTorch {'.'.join(map(str, _LEAST_TORCH))} or later. In"
      f" {torch.__version__}, which is installed, a file could run code: pip"
      " install --upgrade 'resnet_flax[torch]'."
    )
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      if any(info.compress_type for info in archive.infolist()):
        raise errors.WeightsError(
          f"{path} must not be compressed, as it may fill the memory. Save the"
          " state dict again: torch.save(state_dict, PATH) does not compress."
        )
  try:
    # `weights_only` refuses anything but tensors and plain containers.
    loaded = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:
    # PyTorch's own text is long and explains how to run the code.
    raise errors.WeightsError(
      f"{path} is damaged, or holds more than tensors, which could run code"
      f" ({type(error).__name__}). Save only the state dict:"
      " torch.save(model.state_dict(), PATH)."
    ) from error
  if isinstance(loaded, Mapping):
    inner = (loaded.get(key) for key in _STATE_DICT_KEYS)
    loaded = next((it for it in inner if isinstance(it, Mapping)), loaded)
  if not isinstance(loaded, Mapping) or not all(
    isinstance(value, torch.Tensor) for value in loaded.values()
  ):
    raise errors.WeightsError(
      f"{path} holds no state dict: it must be a dictionary of tensors, or have"
      f" one as {' or '.join(map(repr, _STATE_DICT_KEYS))}."
    )
  arrays = {}
  for name, tensor in loaded.items():
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored:
      raise errors.WeightsError(
        f"{path}: {name} claims the shape {list(tensor.shape)} but stores"
        f" {stored} bytes."
      )
    if tensor.dtype == torch.bfloat16:
      tensor = tensor.float()
    try:
      arrays[str(name)] = tensor.detach().numpy()
    except TypeError:  # NumPy has no such type.
      raise wrong_type(path, name, tensor.dtype) from None
  return _pytorch(path, arrays)


def _pytorch(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray]
) -> WeightsFile:
  weights, passed_over = {}, []
  for name, array in arrays.items():
    if name.rpartition(".")[2] in _COUNTERS:
      passed_over.append(name)
    else:
      weights[name] = array
  wrappers = {_WRAPPERS.findall(name)[0] for name in weights}
  # A prefix of all weights is not part of their names.
  wrapper = wrappers.pop() if len(wrappers) == 1 else ""
  return WeightsFile(
    path,
    "pytorch",
    {name.removeprefix(wrapper): weights[name] for name in weights},
    tuple(name.removeprefix(wrapper) for name in passed_over),
  )


def _read_keras(path: pathlib.Path) -> WeightsFile:
  with zipfile.ZipFile(path) as archive:
    weights = _member(path, archive, "model.weights.h5")
    model = _member(path, archive, "config.json")
  return _keras(path, hdf5.read(path, io.BytesIO(weights)), model)


def _member(path: pathlib.Path, archive: zipfile.ZipFile, name: str) -> bytes:
  try:
    info = archive.getinfo(name)
  except KeyError:
    raise errors.WeightsError(
      f"{path} is not a .keras file: it has no {name}."
    ) from None
  if info.file_size > _MOST_GROWTH * path.stat().st_size:
    raise errors.WeightsError(
      f"{path}: {name} claims {info.file_size} bytes, more than"
      f" {_MOST_GROWTH} times the whole file."
    )
  with archive.open(info) as member:
    return member.read(info.file_size + 1)  # It may inflate to more.


def _read_hdf5(path: pathlib.Path) -> WeightsFile:
  with path.open("rb") as file:
    tree = hdf5.read(path, file)
  return _keras(path, tree, tree.model)


# For each class of layers with weights, the start of its automatic names; then
# the names of its variables, in the order in which Keras 3 numbers them.
_AUTOMATIC = {
  "Conv2D": "conv2d",
  "Dense": "dense",
  "BatchNormalization": "batch_normalization",
}
VARIABLES = {
  "conv2d": ("kernel", "bias"),
  "dense": ("kernel", "bias"),
  "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
}


def automatic_names(start: str) -> Iterator[str]:
  """Yields 'conv2d', 'conv2d_1', ...: the names of a class's layers in turn."""
  yield start
  for number in itertools.count(1):
    yield f"{start}_{number}"


def layer_class(name: str) -> str:
  """Returns 'conv2d' for 'conv2d_7': an automatic name without its number."""
  return re.sub(r"_\d+$", "", name)


def _keras(
  path: pathlib.Path, tree: hdf5.Tree, model: str | bytes
) -> WeightsFile:
  """Gives the arrays of both of Keras's layouts the same names."""
  layers = json.loads(model)["config"]["layers"] if model else []
  # Maps a layer's place in a file of Keras 3 to its own name.
  names: dict[str, str] = {}
  for kind, start in _AUTOMATIC.items():
    of_kind = [x["config"]["name"] for x in layers if x["class_name"] == kind]
    names.update(zip(automatic_names(start), of_kind, strict=False))
  names |= tree.layer_names
  arrays: dict[str, np.ndarray] = {}
  has_layer_names = True
  for key, array in tree.arrays.items():
    parts = key.replace("\\", "/").split("/")  # Windows writes backslashes.
    if parts[0] == "layers":  # layers/conv2d_7/vars/0
      place = parts[1]
      layer, variable = names.get(place, place), "/".join(parts[2:])
      has_layer_names &= place in names
      for number, name in enumerate(VARIABLES.get(layer_class(place), ())):
        variable = name if variable == f"vars/{number}" else variable
    else:  # The legacy layout: model_weights/conv1/[more/]conv1/kernel:0.
      layer = parts[parts[0] == "model_weights"]
      variable = parts[-1].removesuffix(":0")
    name = f"{layer}/{variable}"
    if name in arrays:
      raise errors.WeightsError(f"{path} has two layers named {layer}.")
    arrays[name] = array
  return WeightsFile(
    path, "keras", arrays, tuple(tree.passed_over), has_layer_names, layers
  )


# For each extension, the file's reader and a pattern of its first bytes.
_READERS: dict[str, tuple[Callable[[pathlib.Path], WeightsFile], bytes]] = {
  # The JSON header comes after its length.
  ".safetensors": (_read_safetensors, rb".{8}\{"),
  # Before version 1.6, PyTorch wrote pickles without an archive around them.
  **dict.fromkeys(
    (".pt", ".pth", ".th", ".bin", ".ckpt"), (_read_torch, rb"PK\x03\x04|\x80")
  ),
  ".keras": (_read_keras, rb"PK\x03\x04"),
  **dict.fromkeys((".h5", ".hdf5"), (_read_hdf5, rb"\x89HDF\r\n\x1a\n")),
}
