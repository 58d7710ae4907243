import os

import pytest

from resnet_flax.run import files


def test_replaces_what_was_there(tmp_path):
  path = tmp_path / "results.json"
  for content in (b"first", b"second"):
    files.write_file(path, content)
    assert path.read_bytes() == content
  assert list(tmp_path.iterdir()) == [path]


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
