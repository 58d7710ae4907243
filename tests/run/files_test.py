import os
import pathlib

import pytest

from resnet_flax.run import files


def test_regular_file(tmp_path):
  path = tmp_path / "a é"
  path.write_text("é")
  assert files.read_text(path) == "é"
  with files.open_regular(path) as file:
    assert file.read() == "é".encode()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file(tmp_path, make):
  make(tmp_path / "a")
  with pytest.raises(OSError, match="not a regular file"):
    files.open_regular(tmp_path / "a")


def test_device():
  with pytest.raises(OSError, match="not a regular file"):
    files.open_regular(pathlib.Path("/dev/zero"))


def test_text_that_is_too_long_or_none(tmp_path):
  path = tmp_path / "a"
  path.write_bytes(b"12345")
  assert files.read_text(path, limit=5) == "12345"
  with pytest.raises(ValueError, match="more than 4 bytes"):
    files.read_text(path, limit=4)
  path.write_bytes(b"\xff")
  with pytest.raises(ValueError, match="utf-8"):
    files.read_text(path)


def test_replaces_what_was_there(tmp_path):
  path = tmp_path / "results.json"
  for content in (b"first", b"second"):
    files.write_file(path, content)
    assert path.read_bytes() == content
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("link", [True, False])
def test_what_lies_at_the_temporary_name_is_not_written_to(tmp_path, link):
  """A link there may lead to a file of the user's."""
  path, precious = tmp_path / "results.json", tmp_path / "precious"
  precious.write_text("mine")
  temporary = tmp_path / "results.json.tmp"
  if link:
    temporary.symlink_to(precious)
  else:
    temporary.write_text("left by a killed run")
  files.write_file(path, b"first")
  assert not path.is_symlink()
  assert path.read_bytes() == b"first"
  assert precious.read_text() == "mine"
  assert not temporary.exists()


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
  path = tmp_path / "results.json"
  files.write_file(path, b"first")

  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(OSError, match="No space left"):
    files.write_file(path, b"second")
  assert path.read_bytes() == b"first"
  assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
  """After a power cut the file would be there, and empty."""
  path, seen = tmp_path / "a.json", []
  monkeypatch.setattr(files.os, "fsync", lambda _: seen.append(path.exists()))
  files.write_json(path, {})
  assert seen == [False]
