"""What files are read, and that no file does anything but be read."""

import importlib.util
import io
import json
import os
import pickle
import random
import struct
import sys
import types
import zipfile

import numpy as np
import pytest

from resnet_flax.run import errors
from resnet_flax.tools.weights import files
from tests.tools.weights import networks

h5py = pytest.importorskip("h5py")


def hdf5_bytes(arrays):
  buffer = io.BytesIO()
  with h5py.File(buffer, "w") as file:
    for name, array in arrays.items():
      file[name] = array
  return buffer.getvalue()


LAYERS = {
  "layers/conv2d/vars/0": np.ones((1, 1, 2, 3), np.float32),
  "layers/conv2d/vars/1": np.ones(3, np.float32),
  "layers/dense/vars/0": np.ones((3, 2), np.float32),
}
CONFIG = {
  "config": {
    "layers": [
      {"class_name": "Conv2D", "config": {"name": "first"}},
      {"class_name": "Dense", "config": {"name": "last"}},
    ]
  }
}


def keras_zip(path, weights, config=CONFIG, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("config.json", json.dumps(config))
    archive.writestr("model.weights.h5", weights)
  return path


@pytest.fixture
def samples(tmp_path):
  """One good file of each kind that is read without PyTorch."""
  state = networks.cifar_state_dict()
  good = tmp_path / "good"
  good.mkdir()
  (good / "a.weights.h5").write_bytes(hdf5_bytes(LAYERS))
  return [
    networks.save(state, good / "a.safetensors"),
    good / "a.weights.h5",
    keras_zip(good / "a.keras", hdf5_bytes(LAYERS)),
  ]


def test_keras_layouts_have_the_same_names(samples, tmp_path):
  legacy = tmp_path / "a.h5"
  legacy.write_bytes(
    hdf5_bytes(
      {
        "model_weights/conv2d/model/conv2d/kernel:0": np.ones(1, np.float32),
        "model_weights/bn/bn/moving_mean": np.ones(2, np.float32),
        "optimizer_weights/adam/iteration": np.ones((), np.int64),
      }
    )
  )
  read = files.read(legacy)
  assert set(read.arrays) == {"conv2d/kernel", "bn/moving_mean"}
  assert read.passed_over == ("optimizer_weights/adam/iteration",)
  assert read.has_layer_names
  unnamed = files.read(samples[1])
  names = {"conv2d/kernel", "conv2d/bias", "dense/kernel"}
  assert set(unnamed.arrays) == names
  assert not unnamed.has_layer_names
  named = files.read(samples[2])
  assert set(named.arrays) == {"first/kernel", "first/bias", "last/kernel"}
  assert named.has_layer_names


def test_parallel_prefix_and_counters(tmp_path):
  state = networks.cifar_state_dict()
  wrapped = {f"module.{name}": array for name, array in state.items()}
  plain = files.read(networks.save(state, tmp_path / "a.safetensors"))
  read = files.read(networks.save(wrapped, tmp_path / "b.safetensors"))
  assert read.arrays.keys() == plain.arrays.keys()
  assert read.passed_over == plain.passed_over
  assert len(read.passed_over) == 7
  # Not in the order of the file, so that none hides another.
  for prefix in ("_orig_mod.", "module._orig_mod.", "_orig_mod.module.model."):
    wrapped = {prefix + name: array for name, array in state.items()}
    wrapped["n_averaged"] = np.array(5)
    read = files.read(networks.save(wrapped, tmp_path / "d.safetensors"))
    assert read.arrays.keys() == plain.arrays.keys()
    assert "n_averaged" in read.passed_over
  wrapped = {f"module.{name}": array for name, array in state.items()}
  # Only a prefix of all is one.
  wrapped["linear.bias"] = wrapped.pop("module.linear.bias")
  mixed = files.read(networks.save(wrapped, tmp_path / "c.safetensors"))
  assert "module.conv1.weight" in mixed.arrays


def test_truncated(samples, tmp_path):
  for sample in samples:
    data = sample.read_bytes()
    path = tmp_path / sample.name
    for length in [0, 1, 7, 8, 9, 100, *range(200, len(data), 997)]:
      path.write_bytes(data[:length])
      with pytest.raises(errors.WeightsError) as raised:
        files.read(path)
      assert str(path) in str(raised.value)


def test_flipped_bytes_are_refused_or_read(samples, tmp_path):
  """Whatever a file is, it ends in one line or in arrays."""
  rng = random.Random(0)
  for sample in samples:
    data = sample.read_bytes()
    path = tmp_path / sample.name
    for _ in range(150):
      changed = bytearray(data)
      for _ in range(rng.choice([1, 1, 2, 20])):
        # Most structure is near the start.
        end = rng.choice([200, 2000, len(data)])
        changed[rng.randrange(min(end, len(data)))] = rng.randrange(256)
      path.write_bytes(changed)
      try:
        read = files.read(path)
      except errors.WeightsError:
        continue
      size = sum(array.nbytes for array in read.arrays.values())
      assert size <= 2 * len(data)


class Code:
  """Leaves a mark if it is unpickled."""

  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["a.h5", "a.keras", "a.safetensors"])
def test_pickles_are_only_pytorchs(name, tmp_path):
  path, mark = tmp_path / name, tmp_path / "mark"
  path.write_bytes(pickle.dumps({"conv1.weight": Code(mark)}, protocol=2))
  with pytest.raises(errors.WeightsError, match="extension says"):
    files.read(path)
  assert not mark.exists()


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.th"])
@pytest.mark.parametrize("in_archive", [True, False])
def test_code_in_pytorchs_pickles_is_not_run(name, in_archive, tmp_path):
  """By the real PyTorch, in both of its formats."""
  torch = pytest.importorskip("torch")
  path, mark = tmp_path / name, tmp_path / "mark"
  state = {"conv1.weight": Code(mark), "bn1.weight": torch.ones(3)}
  torch.save(state, path, _use_new_zipfile_serialization=in_archive)
  with pytest.raises(errors.WeightsError, match="holds more than tensors"):
    files.read(path)
  assert not mark.exists()
  # It would have been.
  torch.load(path, weights_only=False)
  assert mark.exists()


def test_reads_what_pytorch_writes(tmp_path):
  torch = pytest.importorskip("torch")
  state = {
    "conv1.weight": torch.arange(6.0).reshape(2, 3),
    "bn1.weight": torch.ones(3, dtype=torch.bfloat16),
    "bn1.num_batches_tracked": torch.tensor(3),
  }
  torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.th")
  read = files.read(tmp_path / "a.th")
  assert set(read.arrays) == {"conv1.weight", "bn1.weight"}
  np.testing.assert_array_equal(
    read.arrays["conv1.weight"], state["conv1.weight"].numpy()
  )
  assert read.passed_over == ("bn1.num_batches_tracked",)


class StubTensor:
  """As much of a tensor as is looked at."""

  dtype = "float32"

  def __init__(self, array):
    self._array = array
    self.shape = array.shape

  def numel(self):
    return self._array.size

  def element_size(self):
    return self._array.itemsize

  def untyped_storage(self):
    return types.SimpleNamespace(nbytes=lambda: self._array.nbytes)

  def detach(self):
    return self

  def numpy(self):
    return self._array


@pytest.fixture
def stub_torch(monkeypatch):
  """A module whose `load` notes its arguments and gives `loaded`."""
  torch = types.ModuleType("torch")
  torch.__version__ = "2.10.0+cpu"
  torch.Tensor = StubTensor
  torch.bfloat16 = "bfloat16"
  torch.calls = []
  torch.loaded = None

  def load(*arguments, **options):
    torch.calls.append((arguments, options))
    if isinstance(torch.loaded, Exception):
      raise torch.loaded
    return torch.loaded

  torch.load = load
  monkeypatch.setitem(sys.modules, "torch", torch)
  return torch


STATE_DICT = {
  "conv1.weight": StubTensor(np.ones((2, 3), np.float32)),
  "bn1.num_batches_tracked": StubTensor(np.array(3)),
}


@pytest.fixture(
  params=["a.pt", "a.pth", "a.th", "a.PTH", "a.pth.tar", "a.bin", "a.ckpt"]
)
def torch_file(request, tmp_path):
  path = tmp_path / request.param
  path.write_bytes(b"PK\x03\x04")
  return path


@pytest.mark.parametrize(
  "loaded",
  [
    STATE_DICT,
    {"state_dict": STATE_DICT, "epoch": 3},
    {"model": STATE_DICT, "optimizer": {}},
    {f"module.{name}": tensor for name, tensor in STATE_DICT.items()},
    {"net": STATE_DICT, "acc": 0.9},
    {"model_state_dict": STATE_DICT},
  ],
)
def test_pytorch_loads_tensors_alone(stub_torch, torch_file, loaded):
  stub_torch.loaded = loaded
  read = files.read(torch_file)
  assert stub_torch.calls == [
    ((torch_file,), {"map_location": "cpu", "weights_only": True})
  ]
  assert read.library == "pytorch"
  assert set(read.arrays) == {"conv1.weight"}
  assert read.passed_over == ("bn1.num_batches_tracked",)


@pytest.mark.parametrize(
  "loaded",
  [
    [],
    {"conv1.weight": 1},
    {"network": STATE_DICT},
    {"state_dict": {"conv1.weight": 1}},
  ],
)
def test_pytorch_files_without_a_state_dict(stub_torch, torch_file, loaded):
  stub_torch.loaded = loaded
  with pytest.raises(errors.WeightsError, match="holds no state dict"):
    files.read(torch_file)


def test_pytorchs_types_that_numpy_lacks(stub_torch, torch_file):
  def fail():
    raise TypeError("Got unsupported ScalarType Float8_e4m3fn")

  tensor = StubTensor(np.ones(2, np.uint8))
  tensor.dtype, tensor.numpy = "torch.float8_e4m3fn", fail
  stub_torch.loaded = {"fc.weight": tensor}
  message = "fc.weight is torch.float8_e4m3fn; it must be float32,"
  with pytest.raises(errors.WeightsError, match=message):
    files.read(torch_file)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_types_that_numpy_lacks(kind, tmp_path):
  place = {"dtype": kind, "shape": [2], "data_offsets": [0, 2]}
  header = json.dumps({"fc.weight": place}).encode()
  path = tmp_path / "a.safetensors"
  path.write_bytes(struct.pack("<Q", len(header)) + header + b"..")
  with pytest.raises(
    errors.WeightsError, match=f"fc.weight is {kind}; it must be"
  ):
    files.read(path)


def test_tensors_that_claim_more_than_they_store(stub_torch, torch_file):
  tensor = StubTensor(np.ones(2, np.float32))
  tensor.untyped_storage = lambda: types.SimpleNamespace(nbytes=lambda: 4)
  stub_torch.loaded = {"fc.weight": tensor}
  message = r"fc.weight claims the shape \[2\] but stores 4 bytes"
  with pytest.raises(errors.WeightsError, match=message):
    files.read(torch_file)


def test_what_pytorch_refuses(stub_torch, torch_file):
  stub_torch.loaded = pickle.UnpicklingError("set weights_only=False\nto run")
  with pytest.raises(errors.WeightsError, match="more than tensors") as raised:
    files.read(torch_file)
  # It is not tried again, and nobody is told how to.
  assert len(stub_torch.calls) == 1
  assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu124", "unknown"])
def test_pytorch_that_may_run_code(stub_torch, torch_file, version):
  stub_torch.__version__ = version
  stub_torch.loaded = STATE_DICT
  with pytest.raises(errors.WeightsError, match=r"PyTorch 2\.6 or") as raised:
    files.read(torch_file)
  assert f"{version}, which is installed" in str(raised.value)
  assert "pip install --upgrade 'resnet_flax[torch]'" in str(raised.value)
  assert stub_torch.calls == []


@pytest.mark.parametrize("version", ["2.6.0", "2.6.0a0+git1", "3.0.0"])
def test_pytorch_that_runs_none(stub_torch, torch_file, version):
  stub_torch.__version__ = version
  stub_torch.loaded = STATE_DICT
  assert files.read(torch_file).arrays


@pytest.mark.skipif(
  importlib.util.find_spec("torch") is not None, reason="PyTorch is there"
)
def test_without_pytorch(tmp_path):
  path = tmp_path / "a.pth"
  path.write_bytes(b"PK\x03\x04")
  with pytest.raises(errors.ConfigError) as raised:
    files.read(path)
  assert "pip install 'resnet_flax[torch]'" in str(raised.value)
  assert "safetensors" in str(raised.value)


@pytest.mark.parametrize(
  ("name", "data", "message"),
  [
    ("a.npz", b"", "has the extension '.npz', which must be one of .bin, "),
    ("a.tar", b"", "has the extension '.tar'"),
    ("a.KERAS", b"\x89HDF\r\n\x1a\n", r"begins with b'\x89HDF"),
    ("a.h5", b"", "it begins with b''"),
    ("a.h5", b"PK\x03\x04", "it begins with b'PK"),
    ("a.h5", b"<!doctype html>", "it begins with b'<!doctype html>'"),
    ("a.h5", b"version https://git-lfs", "b'version https://git-lfs'"),
    ("a.safetensors", b"PK\x03\x04", "it begins with b'PK"),
    ("a.pt", b"\x1f\x8b", r"begins with b'\x1f\x8b'"),
    ("a.bin", b"version https://git-lfs", "b'version https://git-lfs'"),
    ("a.safetensors", b"\x00\x00\x00\x00\x00\x00\x00\x7f{}", "is damaged"),
  ],
)
def test_not_what_the_extension_says(name, data, message, tmp_path):
  path = tmp_path / name
  path.write_bytes(data)
  with pytest.raises(errors.WeightsError) as raised:
    files.read(path)
  assert message in str(raised.value)


def test_no_file(tmp_path):
  with pytest.raises(errors.WeightsError, match="No such file"):
    files.read(tmp_path / "a.h5")
  (tmp_path / "b.h5").mkdir()
  with pytest.raises(errors.WeightsError, match="Is a directory"):
    files.read(tmp_path / "b.h5")


def test_archives_that_may_grow(tmp_path):
  path = tmp_path / "a.keras"
  keras_zip(path, bytes(10**7), compression=zipfile.ZIP_DEFLATED)
  with pytest.raises(errors.WeightsError, match="must not be compressed"):
    files.read(path)


def test_pytorch_archives_that_grow(stub_torch, tmp_path):
  """What is compressed may be any size; PyTorch compresses nothing."""
  path = tmp_path / "a.pt"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("archive/data.pkl", bytes(10**7))
  with pytest.raises(errors.WeightsError, match="must not be compressed"):
    files.read(path)
  assert not stub_torch.calls


def test_archives_without_weights(tmp_path):
  path = tmp_path / "a.keras"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("readme.txt", "")
  with pytest.raises(
    errors.WeightsError, match=r"no item .* 'model\.weights\.h5'"
  ):
    files.read(path)


@pytest.mark.parametrize("config", [[], {}, {"config": {"layers": [1]}}])
def test_archives_with_another_config(config, tmp_path):
  path = keras_zip(tmp_path / "a.keras", hdf5_bytes(LAYERS), config)
  with pytest.raises(errors.WeightsError, match="is damaged, or is not"):
    files.read(path)


def test_two_layers_of_one_name(tmp_path):
  config = json.loads(json.dumps(CONFIG))
  config["config"]["layers"][1]["config"]["name"] = "first"
  path = keras_zip(tmp_path / "a.keras", hdf5_bytes(LAYERS), config)
  with pytest.raises(errors.WeightsError, match="two layers named first"):
    files.read(path)


# ---- HDF5


def write_hdf5(path, fill):
  """A file that `fill` has filled."""
  with h5py.File(path, "w") as file:
    fill(file)
  return path


KERNEL = np.ones((2, 3), np.float32)


def test_reads_what_keras_writes(tmp_path):
  def fill(file):
    file["layers/conv2d_1/vars/0"] = KERNEL
    file["layers/conv2d_1/vars"].attrs["name"] = "conv2d_7"
    file["optimizer/vars/0"] = np.int64(3)
    file["layers/random_flip/seed_generator/vars/0"] = np.zeros(2, np.uint32)

  read = files.read(write_hdf5(tmp_path / "a.h5", fill))
  np.testing.assert_array_equal(read.arrays["conv2d_7/kernel"], KERNEL)
  assert len(read.arrays) == 1
  assert read.has_layer_names
  assert set(read.passed_over) == {
    "optimizer/vars/0",
    "layers/random_flip/seed_generator/vars/0",
  }


@pytest.mark.parametrize(
  "how",
  [
    {"chunks": (10, 2), "fillvalue": 3},
    {"chunks": (100, 3), "maxshape": (None, 3)},
    {"shuffle": True, "fletcher32": True},
  ],
)
@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_reads_what_was_packed_anew(tmp_path, how, version):
  kernel, path = np.arange(192, dtype="f4").reshape(64, 3), tmp_path / "a.h5"
  with h5py.File(path, "w", libver=version, track_order=True) as file:
    group = file.create_group("layers/conv2d/vars", track_order=True)
    group.create_dataset("0", data=kernel, **how)
  (found,) = files.read(path).arrays.values()
  np.testing.assert_array_equal(found, kernel)


def test_without_its_library(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "h5py", None)
  (tmp_path / "a.h5").touch()
  with pytest.raises(
    errors.ConfigError, match=r"a.h5 needs h5py, .*'resnet_flax\[h5py\]'"
  ):
    files.read(tmp_path / "a.h5")


def test_links_are_not_followed(tmp_path):
  def fill(file):
    file["conv/kernel"] = KERNEL
    file["conv/outside"] = h5py.ExternalLink("/etc/passwd", "/kernel")
    file["conv/soft"] = h5py.SoftLink("/conv/kernel")
    file["conv/circle"] = file["conv"]
    file["conv/type"] = np.dtype("f4")

  read = files.read(write_hdf5(tmp_path / "a.h5", fill))
  assert read.arrays.keys() == {"conv/kernel"}


def unallocated(file):
  file.create_dataset("kernel", (2**40,), np.float32, chunks=(1024,))


def compressed(file):
  file.create_dataset("kernel", data=np.zeros(10**6), compression="gzip")


def external_values(file):
  external = [("/etc/passwd", 0, 8)]
  file.create_dataset("kernel", (2,), np.float32, external=external)


def virtual(file):
  layout = h5py.VirtualLayout((2,), np.float32)
  layout[:] = h5py.VirtualSource("/etc/passwd", "kernel", (2,))
  file.create_virtual_dataset("kernel", layout)


def text(file):
  file["kernel"] = "text"


def integers(file):
  file["kernel"] = np.ones(2, np.int64)


def no_space(file):
  file["kernel"] = h5py.Empty("i4")


@pytest.mark.parametrize("fill", [text, integers, no_space])
def test_values_that_are_no_weights(fill, tmp_path):
  path = write_hdf5(tmp_path / "a.h5", fill)
  with pytest.raises(errors.WeightsError, match=r"kernel is .*; it must be"):
    files.read(path)


def test_a_name_that_may_fill_the_memory(tmp_path):
  def fill(file):
    file["layers/conv2d/vars/0"] = KERNEL
    file["layers/conv2d/vars"].attrs["name"] = np.bytes_(b"x" * 50000)

  with pytest.raises(errors.WeightsError, match="must have at most 4096 bytes"):
    files.read(write_hdf5(tmp_path / "a.h5", fill))


@pytest.mark.parametrize(
  "fill", [unallocated, compressed, external_values, virtual]
)
def test_values_that_are_not_all_in_the_file(fill, tmp_path):
  path = write_hdf5(tmp_path / "a.h5", fill)
  with pytest.raises(errors.WeightsError, match=r"kernel must .*h5repack"):
    files.read(path)
