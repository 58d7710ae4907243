import dataclasses
import gc
import socket
import tarfile
import time
import warnings

import numpy as np
import pytest

from resnet_flax import errors
from resnet_flax.datasets import archive, cifar
from tests.datasets import archives


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(autouse=True)
def _collect_sockets():
  """Pooch leaves a failed response to the garbage collector."""
  yield
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)
    gc.collect()


@pytest.fixture(params=["cifar10", "cifar100"])
def small(request, monkeypatch, tmp_path):
  """The spec of a small archive, its path, images and labels."""
  path = tmp_path / f"{request.param}-binary.tar.gz"
  images, labels = archives.install(monkeypatch, request.param, path)
  return cifar.ARCHIVES[request.param], path, images, labels


def test_read(small):
  spec, path, images, labels = small
  archive.verify(spec, path)
  contents = archive.read(spec, path)
  for split in ("train", "test"):
    np.testing.assert_array_equal(contents.images[split], images[split])
    # The last label byte is the fine one.
    np.testing.assert_array_equal(contents.labels[split][:, -1], labels[split])
  assert contents.names["label"][3] == "class_3"


def test_a_changed_byte_is_noticed(small):
  spec, path, _, _ = small
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(raw)
  with pytest.raises(errors.DataError, match="is not the official archive"):
    archive.verify(spec, path)


def test_missing_file():
  spec = cifar.ARCHIVES["cifar10"]
  with pytest.raises(errors.DataError, match="No such file"):
    archive.verify(spec, cifar.pathlib.Path("no-such-file.tar.gz"))


def broken(spec, path, change):
  members, _, _ = archives.contents(spec, 10)
  change(members)
  archives.write(path, members)
  return path


def test_a_missing_member(small):
  spec, path, _, _ = small
  name = f"{spec.folder}/{spec.files['test'][0]}"
  broken(spec, path, lambda members: members.pop(name))
  with pytest.raises(errors.DataError, match=f"lacks {name}"):
    archive.read(spec, path)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"x"])
def test_a_member_of_the_wrong_size(small, change):
  spec, path, _, _ = small
  name = f"{spec.folder}/{spec.files['train'][0]}"
  broken(
    spec, path, lambda members: members.update({name: change(members[name])})
  )
  with pytest.raises(errors.DataError, match="needed: a file of"):
    archive.read(spec, path)


def test_a_link_is_not_followed(small, tmp_path):
  spec, path, _, _ = small
  secret = tmp_path / "secret"
  secret.write_bytes(b"x")
  with tarfile.open(path, "w:gz") as tar:
    link = tarfile.TarInfo(f"{spec.folder}/{spec.files['test'][0]}")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    tar.addfile(link)
  with pytest.raises(errors.DataError, match="needed: a file of"):
    archive.read(spec, path)


def test_other_members_are_left_alone(small, tmp_path):
  spec, path, _, _ = small
  members, _, _ = archives.contents(spec, spec.num_names["label"])
  members["../escaped"] = b"x"
  members["/absolute"] = b"x"
  archives.write(path, members)
  archive.read(spec, path)
  assert not (tmp_path.parent / "escaped").exists()


@pytest.mark.parametrize("cut", [0, 10, 1000])
def test_a_short_archive(small, cut):
  spec, path, _, _ = small
  path.write_bytes(path.read_bytes()[:cut])
  with pytest.raises(errors.DataError, match=r"cannot be read as|lacks"):
    archive.read(spec, path)


def test_fetch(small, server, tmp_path):
  spec, path, _, _ = small
  folder, url = server
  (folder / path.name).write_bytes(path.read_bytes())
  spec = dataclasses.replace(spec, url=f"{url}/{path.name}")
  target = tmp_path / "data"
  fetched = archive.fetch(spec, target)
  assert fetched.read_bytes() == path.read_bytes()
  # What is there already is not fetched again.
  (folder / path.name).unlink()
  assert archive.fetch(spec, target) == fetched


def test_fetch_of_a_wrong_file_leaves_nothing(small, server, tmp_path):
  spec, path, _, _ = small
  folder, url = server
  (folder / path.name).write_bytes(b"not the archive")
  spec = dataclasses.replace(spec, url=f"{url}/{path.name}")
  target = tmp_path / "data"
  with pytest.raises(errors.DataError, match=r"dataset\.archive=FILE"):
    archive.fetch(spec, target)
  assert list(target.iterdir()) == []


def test_fetch_names_the_ways_out(small, server, tmp_path):
  spec, _, _, _ = small
  _, url = server
  spec = dataclasses.replace(spec, url=f"{url}/missing.tar.gz")
  with pytest.raises(errors.DataError) as caught:
    archive.fetch(spec, tmp_path / "data")
  message = str(caught.value)
  for way in ("dataset.archive", "TFDS_DATA_DIR", "configs/quickstart.py"):
    assert way in message
  assert "\n" not in message


def test_fetch_without_network(small, tmp_path):
  spec, _, _, _ = small
  with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    port = unused.getsockname()[1]
  spec = dataclasses.replace(spec, url=f"http://127.0.0.1:{port}/a.tar.gz")
  with pytest.raises(errors.DataError, match="ConnectionError"):
    archive.fetch(spec, tmp_path / "data")


def test_fetch_gives_up_on_a_silent_server(small, monkeypatch, tmp_path):
  spec, _, _, _ = small
  monkeypatch.setattr(archive, "_TIMEOUT", 0.3)
  with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    port = silent.getsockname()[1]
    spec = dataclasses.replace(spec, url=f"http://127.0.0.1:{port}/a.tar.gz")
    started = time.monotonic()
    with pytest.raises(errors.DataError, match="Timeout"):
      archive.fetch(spec, tmp_path / "data")
    # Not a benchmark: without the limit the test would hang.
    assert time.monotonic() - started < 60
