import json

import numpy as np
import pytest

from resnet_flax import errors
from resnet_flax.datasets import cache


class Builder:
  """Builds the arrays and counts how often it had to."""

  def __init__(self, arrays):
    self.arrays, self.calls = arrays, 0

  def __call__(self):
    self.calls += 1
    return self.arrays


def check_equal(found, expected):
  assert isinstance(found.train_images, np.memmap)
  assert found.class_names == expected.class_names
  for name in ("train_images", "train_labels", "test_images", "test_labels"):
    np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 0}', "\0"])
def test_damaged_index_is_built_again(tmp_path, arrays, text):
  build = Builder(arrays)
  cache.cached(tmp_path, "key", build)
  (tmp_path / "key" / "index.json").write_text(text)
  check_equal(cache.cached(tmp_path, "key", build), arrays)
  assert build.calls == 2


def test_failed_build_leaves_nothing(tmp_path, arrays, monkeypatch):
  def fail(*_, **__):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(json, "dumps", fail)
  with pytest.raises(errors.DataError, match="No space left"):
    cache.cached(tmp_path, "key", Builder(arrays))
  assert list(tmp_path.iterdir()) == []


def test_unwritable_folder(tmp_path, arrays):
  blocked = tmp_path / "file"
  blocked.write_text("")
  with pytest.raises(errors.DataError, match="cache_dir"):
    cache.cached(blocked / "cache", "key", Builder(arrays))


def test_cache_dir(tmp_path):
  assert cache.cache_dir(str(tmp_path / "x y")) == tmp_path / "x y"
  assert cache.cache_dir("").name == "resnet_flax"
