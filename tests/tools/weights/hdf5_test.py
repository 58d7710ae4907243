"""HDF5 files of strangers."""

import io
import sys

import numpy as np
import pytest

from resnet_flax.run import errors
from resnet_flax.tools.weights import hdf5

h5py = pytest.importorskip("h5py")

KERNEL = np.ones((2, 3), np.float32)


def read(path, fill):
  """Reads a file that `fill` has filled."""
  with h5py.File(path, "w") as file:
    fill(file)
  with path.open("rb") as file:
    return hdf5.read(path, file)


def test_reads_what_keras_writes(tmp_path):
  def fill(file):
    file["layers/conv2d_1/vars/0"] = KERNEL
    file["layers/conv2d_1/vars"].attrs["name"] = "conv2d_7"
    file["optimizer/vars/0"] = np.int64(3)
    file["layers/random_flip/seed_generator/vars/0"] = np.zeros(2, np.uint32)

  tree = read(tmp_path / "a.h5", fill)
  np.testing.assert_array_equal(tree.arrays["layers/conv2d_1/vars/0"], KERNEL)
  assert len(tree.arrays) == 1
  assert set(tree.passed_over) == {
    "optimizer/vars/0",
    "layers/random_flip/seed_generator/vars/0",
  }
  assert tree.layer_names == {"conv2d_1": "conv2d_7"}
  assert tree.model == ""


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
  with path.open("rb") as file:
    (found,) = hdf5.read(path, file).arrays.values()
  np.testing.assert_array_equal(found, kernel)


def test_without_its_library(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "h5py", None)
  with pytest.raises(
    errors.ConfigError, match=r"a.h5 needs h5py, .*'resnet_flax\[h5py\]'"
  ):
    hdf5.read(tmp_path / "a.h5", io.BytesIO())


def test_reads_deep_groups(tmp_path):
  key = "/".join(["group"] * 100)

  def fill(file):
    file[key] = KERNEL

  assert read(tmp_path / "a.h5", fill).arrays.keys() == {key}


def external_link(file):
  file["kernel"] = h5py.ExternalLink("/etc/passwd", "/kernel")


def soft_link(file):
  file["kernel"] = KERNEL
  file["other"] = h5py.SoftLink("/kernel")


def hard_link(file):
  file["kernel"] = KERNEL
  file["other"] = file["kernel"]


def circle(file):
  file["a/b"] = file.create_group("c")
  file["c/a"] = file["a"]


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


def named_type(file):
  file["type"] = np.dtype("f4")


def text(file):
  file["kernel"] = "text"


def integers(file):
  file["kernel"] = np.ones(2, np.int64)


def no_space(file):
  file["kernel"] = h5py.Empty("f4")


def long_name(file):
  file["layers/conv2d/vars/0"] = KERNEL
  file["layers/conv2d/vars"].attrs["name"] = np.bytes_(b"x" * 50000)


@pytest.mark.parametrize(
  ("fill", "message"),
  [
    (external_link, "kernel is a link to another place or file"),
    (soft_link, "other is a link to another place or file"),
    (hard_link, "is in the file under two names"),
    (circle, "is in the file under two names"),
    (unallocated, "claims 4398046511104 bytes as [1099511627776] but stores 0"),
    (compressed, "kernel is compressed (h5repack -f NONE IN OUT undoes it)"),
    (external_values, "has its values in another file"),
    (virtual, "has its values in another file"),
    (named_type, "is neither a group nor an array"),
    (text, "kernel holds object"),
    (integers, "kernel holds int64"),
    (no_space, "kernel holds float32"),
    (long_name, "has a name that is too long"),
  ],
)
def test_what_keras_never_writes(fill, message, tmp_path):
  with pytest.raises(errors.WeightsError) as raised:
    read(tmp_path / "a.h5", fill)
  assert message in str(raised.value)
