import errno
import hashlib
import os
import pathlib
import pickle
import shutil
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from resnet_flax.data import cache
from resnet_flax.run import errors
from tests.data import damage


class Builder:
  """Builds the arrays and counts how often it had to."""

  def __init__(self, arrays):
    self.arrays, self.calls = arrays, 0

  def __call__(self):
    self.calls += 1
    return self.arrays


def check_equal(found, expected):
  assert isinstance(found["train_images"], np.memmap)
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array)


def test_built_once(tmp_path, arrays):
  build = Builder(arrays)
  for _ in range(2):
    check_equal(cache.cached(tmp_path / "c", "key", build), arrays)
  assert build.calls == 1
  cache.cached(tmp_path / "c", "other", build)
  assert build.calls == 2


def truncate(path):
  path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path):
  raw = bytearray(path.read_bytes())
  raw[-1] ^= 1
  path.write_bytes(raw)


def remove(path):
  path.unlink()


@pytest.mark.parametrize("file", ["train_images.npy", "test_labels.npy"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove])
def test_damaged_arrays_are_built_again(tmp_path, arrays, file, damage):
  build = Builder(arrays)
  cache.cached(tmp_path, "key", build)
  damage(tmp_path / "key" / file)
  check_equal(cache.cached(tmp_path, "key", build), arrays)
  assert build.calls == 2


@pytest.mark.parametrize("text", ["", "\0", "0" * 64, "x" * (1 << 20) + "x"])
def test_damaged_sums_are_built_again(tmp_path, arrays, text):
  build = Builder(arrays)
  cache.cached(tmp_path, "key", build)
  (tmp_path / "key" / "SHA256SUMS").write_text(text)
  check_equal(cache.cached(tmp_path, "key", build), arrays)
  assert build.calls == 2


def test_the_sums_are_those_of_sha256sum(tmp_path, arrays):
  cache.cached(tmp_path, "key", Builder(arrays))
  lines = (tmp_path / "key" / "SHA256SUMS").read_text().splitlines()
  for line in lines:
    digest, name = line.split("  ")
    content = (tmp_path / "key" / name).read_bytes()
    assert digest == hashlib.sha256(content).hexdigest()
  assert [line.split()[1] for line in lines] == sorted(
    f"{name}.npy" for name in arrays
  )


class Trap:
  """An object whose unpickling would be noticed."""

  def __reduce__(self):
    return os.mkdir, ("unpickled",)


def save_objects(path):
  np.save(path, np.array([Trap()]), allow_pickle=True)


def save_pickle(path):
  path.write_bytes(pickle.dumps(Trap()))


def save_npz(path):
  with path.open("wb") as file:
    np.savez(file, x=np.zeros(3))


@pytest.mark.parametrize("save", [save_objects, save_pickle, save_npz])
def test_nothing_is_unpickled(tmp_path, arrays, save, monkeypatch):
  """Not even if the digest equals the one in SHA256SUMS."""
  monkeypatch.chdir(tmp_path)
  build = Builder(arrays)
  cache.cached(tmp_path / "c", "key", build)
  path = tmp_path / "c" / "key" / "train_images.npy"
  save(path)
  (path.parent / "SHA256SUMS").write_text(cache._sums(path.parent))
  check_equal(cache.cached(tmp_path / "c", "key", build), arrays)
  assert build.calls == 2
  assert not (tmp_path / "unpickled").exists()


def make_file(path):
  path.write_text("")


def make_dangling_link(path):
  path.symlink_to(path.parent / "missing")


def make_link_to_itself(path):
  path.symlink_to(path)


@pytest.mark.parametrize(
  "make",
  [make_file, os.mkdir, os.mkfifo, make_dangling_link, make_link_to_itself],
)
def test_entry_that_is_none_is_replaced(tmp_path, arrays, make):
  make(tmp_path / "key")
  build = Builder(arrays)
  for _ in range(2):
    check_equal(cache.cached(tmp_path, "key", build), arrays)
  assert build.calls == 1
  assert [path.name for path in tmp_path.iterdir()] == ["key"]
  assert len(list((tmp_path / "key").iterdir())) == 6


@pytest.mark.parametrize("file", ["SHA256SUMS", "test_labels.npy"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_files_that_are_none_are_built_again(tmp_path, arrays, file, make):
  build = Builder(arrays)
  cache.cached(tmp_path, "key", build)
  (tmp_path / "key" / file).unlink()
  make(tmp_path / "key" / file)
  check_equal(cache.cached(tmp_path, "key", build), arrays)
  assert build.calls == 2


@settings(
  deadline=None,
  derandomize=True,
  max_examples=60,
  # The arrays are not changed.
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
  data=st.data(),
  edits=damage.edits(20_000),
  cut=damage.cuts(20_000),
)
def test_any_damage_is_mended(arrays, data, edits, cut):
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    cache.cached(root, "key", Builder(arrays))
    names = sorted(path.name for path in (root / "key").iterdir())
    path = root / "key" / data.draw(st.sampled_from(names))
    damage.apply(path, edits, cut)
    for _ in range(2):
      check_equal(cache.cached(root, "key", Builder(arrays)), arrays)
    assert [path.name for path in root.iterdir()] == ["key"]
    shutil.rmtree(root / "key")


def test_failed_build_leaves_nothing(tmp_path, arrays, monkeypatch):
  def fail(*_, **__):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "save", fail)
  with pytest.raises(errors.DataError, match="No space left"):
    cache.cached(tmp_path, "key", Builder(arrays))
  assert list(tmp_path.iterdir()) == []


def test_unwritable_folder(tmp_path, arrays):
  """The error comes before images are decoded for a minute."""
  blocked, build = tmp_path / "file", Builder(arrays)
  blocked.write_text("")
  for folder in (blocked, blocked / "cache", pathlib.Path("/proc")):
    with pytest.raises(errors.DataError, match="cache_dir"):
      cache.cached(folder, "key", build)
  assert build.calls == 0


def test_what_killed_writers_left_is_removed(tmp_path, arrays):
  """But no file that others write meanwhile, and no file of other people."""
  (tmp_path / ".key-abcdefg1" / "made").mkdir(parents=True)
  os.utime(tmp_path / ".key-abcdefg1", (0, 0))
  (tmp_path / ".keys").mkdir()

  def build():
    assert not (tmp_path / ".key-abcdefg1").exists()
    (own,) = tmp_path.glob(".key-*")
    cache.cached(tmp_path, "key", Builder(arrays))
    assert own.is_dir()
    return arrays

  check_equal(cache.cached(tmp_path, "key", build), arrays)
  assert {path.name for path in tmp_path.iterdir()} == {"key", ".keys"}


def test_cache_dir(tmp_path):
  assert cache.cache_dir(str(tmp_path / "x y")) == tmp_path / "x y"
  assert cache.cache_dir("").name == "resnet_flax"


@pytest.mark.parametrize("is_faster", [True, False])
def test_another_process_that_stores_the_entry_first(
  tmp_path, arrays, monkeypatch, is_faster
):
  """It stores the entry between our look and our renaming."""
  folder, build = tmp_path / "c", Builder(arrays)
  replace = os.replace

  def late(source, target):
    monkeypatch.setattr(cache.os, "replace", replace)
    if is_faster:
      cache.cached(folder, "key", Builder(arrays))
      replace(source, target)
    raise OSError(errno.EACCES, "Permission denied")

  monkeypatch.setattr(cache.os, "replace", late)
  if is_faster:
    check_equal(cache.cached(folder, "key", build), arrays)
    return
  with pytest.raises(errors.DataError, match="cannot be cached in"):
    cache.cached(folder, "key", build)
