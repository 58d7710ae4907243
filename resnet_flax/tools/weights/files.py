"""Reads files of weights as flat dictionaries; never runs code in a file."""

import collections
import contextlib
import io
import json
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from resnet_flax.run import errors

# Counters of batch norms and of `AveragedModel`, which are not weights.
_COUNTERS = ("num_batches_tracked", "n_averaged")
# Keys under which training scripts save the state dict.
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net")
# Prefixes that DataParallel, `torch.compile` and Lightning give all names.
_WRAPPERS = re.compile(r"((?:module\.|_orig_mod\.|model\.)*)")
# Older versions can run code in spite of weights_only (CVE-2025-32434).
_LEAST_TORCH = (2, 6)
# First bytes of zip archives and of the pickles that PyTorch < 1.6 wrote.
_TORCH_STARTS = (b"PK\x03\x04", b"\x80")

# In bytes. Names are read whole into memory; no real name is as long.
_LONGEST_NAME = 4096


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
  # The layers of a whole Keras model, in the order of `model.layers`. Each has
  # class_name and config (with its name). Empty if a file has only weights.
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

  PyTorch: .safetensors, .pt, .pth, .th, .pth.tar, .bin, .ckpt. Keras: .keras,
  .h5, .weights.h5, .hdf5 and our exports in .safetensors. Raises `WeightsError`
  if the file is damaged, compressed, holds code or claims more than it stores,
  and `ConfigError` if the library that reads it is not installed.
  """
  name = path.name.lower()
  readers = [read for end, read in _READERS.items() if name.endswith(end)]
  if not readers:
    raise errors.WeightsError(
      f"{path} has the extension {path.suffix!r}, which must be one of"
      f" {', '.join(sorted(_READERS))}."
    )
  try:
    with path.open("rb") as file:
      start = file.read(24)
  except OSError as error:
    raise errors.WeightsError(
      f"{path} cannot be read: {error.strerror}. Pass the file of weights with"
      " --source."
    ) from error
  # The first bytes reveal a web page or a Git LFS pointer in the file's place.
  with explain(
    f"{path} is damaged, or is not what its extension says; it begins with"
    f" {start!r}"
  ):
    if readers[0] is _read_torch and not start.startswith(_TORCH_STARTS):
      raise ValueError("PyTorch writes zip archives and, earlier, pickles")
    return readers[0](path)


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
  """The error for an array whose dtype weights cannot have."""
  return errors.WeightsError(
    f"{path}: {name} is {dtype}; it must be float32, float16, bfloat16 or"
    " float64."
  )


def _check_stored(path: pathlib.Path, archive: zipfile.ZipFile) -> None:
  """Refuses compressed archives, which may fill the memory when read."""
  if any(member.compress_type for member in archive.infolist()):
    raise errors.WeightsError(
      f"{path} must not be compressed. Save it again with its library, which"
      " does not compress."
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
  # `resnet_flax.export` writes Keras's names with '/'; PyTorch's have dots.
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
  version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
  if version < _LEAST_TORCH:
    raise errors.WeightsError(
      f"{path} needs PyTorch {'.'.join(map(str, _LEAST_TORCH))} or later. In"
      f" {torch.__version__}, which is installed, a file could run code: pip"
      " install --upgrade 'resnet_flax[torch]'."
    )
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      _check_stored(path, archive)
  try:
    # `weights_only` refuses anything but tensors and plain containers.
    loaded = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:
    # PyTorch's own message is left out: it explains how to run the code.
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
    # NumPy has no bfloat16.
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    try:
      arrays[str(name)] = tensor.detach().numpy()
    except TypeError:  # NumPy has no such type.
      raise wrong_type(path, name, tensor.dtype) from None
  return _pytorch(path, arrays)


def _pytorch(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray]
) -> WeightsFile:
  counters = [n for n in arrays if n.rpartition(".")[2] in _COUNTERS]
  weights = {n: array for n, array in arrays.items() if n not in counters}
  wrappers = {_WRAPPERS.findall(name)[0] for name in weights}
  # A prefix that all weights share is a wrapper's, not part of their names.
  wrapper = wrappers.pop() if len(wrappers) == 1 else ""
  return WeightsFile(
    path,
    "pytorch",
    {name.removeprefix(wrapper): weights[name] for name in weights},
    tuple(name.removeprefix(wrapper) for name in counters),
  )


def _read_keras(path: pathlib.Path) -> WeightsFile:
  with zipfile.ZipFile(path) as archive:
    _check_stored(path, archive)
    weights = io.BytesIO(archive.read("model.weights.h5"))
    return _read_hdf5(path, weights, archive.read("config.json"))


# Maps each layer class with weights to the names of its variables, in the order
# in which Keras 3 numbers them.
VARIABLES = {
  "conv2d": ("kernel", "bias"),
  "dense": ("kernel", "bias"),
  "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
}


def automatic_names(classes: Iterable[str]) -> Iterator[str]:
  """Yields 'conv2d', 'conv2d_1', 'dense', ... for layers of these classes."""
  counts = collections.Counter[str]()
  for name in classes:
    yield f"{name}_{counts[name]}" if counts[name] else name
    counts[name] += 1


def layer_class(name: str) -> str:
  """Returns 'conv2d' for 'conv2d_7': an automatic name without its number."""
  return re.sub(r"_\d+$", "", name)


def _read_hdf5(
  path: pathlib.Path, inside: BinaryIO | None = None, model: str | bytes = ""
) -> WeightsFile:
  """Reads Keras's two HDF5 layouts; `model` is a .keras file's config.json."""
  with errors.extra("h5py", str(path)):
    import h5py

  members: list[tuple[str, Any]] = []
  # Opened here, since HDF5 would lock a file that it opens by its path.
  with inside or path.open("rb") as file, h5py.File(file, "r") as root:
    # This follows no link, and visits each member once, after its group.
    root.visititems(lambda *member: members.append(member))
    model = model or root.attrs.get("model_config", "")
    layers = json.loads(model)["config"]["layers"] if model else []
    # 'BatchNormalization' becomes 'batch_normalization'.
    classes = [
      re.sub("([a-z])([A-Z])", r"\1_\2", layer["class_name"]).lower()
      for layer in layers
    ]
    layer_names = [layer["config"]["name"] for layer in layers]
    # Maps a layer's place in a file of Keras 3, such as 'conv2d', to its name.
    names = dict(zip(automatic_names(classes), layer_names, strict=True))
    arrays: dict[str, np.ndarray] = {}
    passed_over, places = [], set()
    for key, member in members:
      parts = key.replace("\\", "/").split("/")  # Windows writes backslashes.
      if not isinstance(member, h5py.Dataset):
        if re.fullmatch("layers/[^/]*/vars", key) and "name" in member.attrs:
          if member.attrs.get_id("name").get_storage_size() > _LONGEST_NAME:
            raise errors.WeightsError(
              f"{path}: the layer name at {key[:200]} must have at most"
              f" {_LONGEST_NAME} bytes. Rename the layer and save again."
            )
          names[parts[1]] = str(member.attrs["name"])
        continue
      if key.startswith("optimizer") or "seed_generator" in key:
        passed_over.append(key)
        continue
      if member.dtype.kind != "f":  # Text may be longer than its file.
        raise wrong_type(path, key[:200], member.dtype)
      # HDF5 allows arrays that claim any size, or are parts of other files.
      size = member.id.get_storage_size()
      if member.is_virtual or member.external or member.nbytes > size:
        raise errors.WeightsError(
          f"{path}: {key[:200]} must have its values in the file, not"
          f" compressed (h5repack -f NONE IN OUT undoes it). It stores {size}"
          f" bytes of {member.nbytes}."
        )
      if parts[0] == "layers":  # layers/conv2d_7/vars/0
        places.add(place := parts[1])
        layer, variable = names.get(place, place), "/".join(parts[2:])
        for number, name in enumerate(VARIABLES.get(layer_class(place), ())):
          variable = name if variable == f"vars/{number}" else variable
      else:  # The legacy layout: model_weights/conv1/[more/]conv1/kernel:0.
        layer = parts[parts[0] == "model_weights"]
        variable = parts[-1].removesuffix(":0")
      if f"{layer}/{variable}" in arrays:
        raise errors.WeightsError(f"{path} has two layers named {layer}.")
      arrays[f"{layer}/{variable}"] = np.asarray(member[()])
  has_names = places <= names.keys()
  return WeightsFile(
    path, "keras", arrays, tuple(passed_over), has_names, layers
  )


# The reader of each extension.
_READERS: dict[str, Callable[[pathlib.Path], WeightsFile]] = {
  ".safetensors": _read_safetensors,
  **dict.fromkeys(
    (".pt", ".pth", ".th", ".pth.tar", ".bin", ".ckpt"), _read_torch
  ),
  ".keras": _read_keras,
  **dict.fromkeys((".h5", ".hdf5"), _read_hdf5),
}
