import pytest

from resnet_flax.run import whole_file


def test_replaces_what_was_there(tmp_path):
  path = tmp_path / "results.json"
  for content in (b"first", b"second"):
    whole_file.write(path, content)
    assert path.read_bytes() == content
  assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
  path = tmp_path / "results.json"
  whole_file.write(path, b"first")

  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(whole_file.os, "replace", fail)
  with pytest.raises(OSError, match="No space left"):
    whole_file.write(path, b"second")
  assert path.read_bytes() == b"first"
  assert list(tmp_path.iterdir()) == [path]
