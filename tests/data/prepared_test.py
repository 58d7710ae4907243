import os
import pathlib

import pytest

from resnet_flax.data import prepared


def test_regular_file(tmp_path):
  path = tmp_path / "a é"
  path.write_text("é")
  assert prepared.read_text(path) == "é"
  with prepared.open_regular(path) as file:
    assert file.read() == "é".encode()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file(tmp_path, make):
  make(tmp_path / "a")
  with pytest.raises(OSError, match="not a regular file"):
    prepared.open_regular(tmp_path / "a")


def test_device():
  with pytest.raises(OSError, match="not a regular file"):
    prepared.open_regular(pathlib.Path("/dev/zero"))


def test_text_that_is_too_long_or_none(tmp_path):
  path = tmp_path / "a"
  path.write_bytes(b"12345")
  assert prepared.read_text(path, limit=5) == "12345"
  with pytest.raises(ValueError, match="more than 4 bytes"):
    prepared.read_text(path, limit=4)
  path.write_bytes(b"\xff")
  with pytest.raises(ValueError, match="utf-8"):
    prepared.read_text(path)


def test_resolve(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert prepared.resolve("~/x") == tmp_path / "x"
  monkeypatch.chdir(tmp_path)
  assert prepared.resolve("x y/é") == tmp_path / "x y" / "é"
  # Opening these says what is wrong.
  assert prepared.resolve("~no_such_user/x").name == "x"
  (tmp_path / "circle").symlink_to(tmp_path / "circle")
  assert prepared.resolve("circle") == tmp_path / "circle"
