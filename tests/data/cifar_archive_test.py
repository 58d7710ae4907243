import dataclasses
import gc
import http.server
import os
import pathlib
import socket
import threading
import time
import warnings

import numpy as np
import pytest

from resnet_flax.data import cifar
from resnet_flax.run import errors
from tests.data import archives


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
  cifar.verify(spec, path)
  splits, names = cifar.read_archive(spec, path)
  for split in ("train", "test"):
    read_images, read_labels = splits[split]
    np.testing.assert_array_equal(read_images, images[split])
    # The last label byte is the fine one.
    np.testing.assert_array_equal(read_labels[:, -1], labels[split])
  assert names["label"][3] == "class_3"


def test_a_changed_byte_is_noticed(small):
  spec, path, _, _ = small
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(raw)
  with pytest.raises(errors.DataError, match="is not the official archive"):
    cifar.verify(spec, path)


def test_missing_file():
  spec = cifar.ARCHIVES["cifar10"]
  with pytest.raises(errors.DataError, match="No such file"):
    cifar.verify(spec, cifar.pathlib.Path("no-such-file.tar.gz"))


def make_folder(path):
  path.mkdir()


def make_endless(path):
  path.symlink_to("/dev/zero")


def make_empty(path):
  path.write_bytes(b"")


def make_circle(path):
  path.symlink_to(path)


def make_gigantic(path):
  with path.open("wb") as file:
    file.truncate(1 << 40)  # Takes no space, but hours to read.


@pytest.mark.parametrize(
  "make", [make_folder, os.mkfifo, make_endless, make_empty, make_circle]
)
def test_path_that_is_no_archive(tmp_path, make):
  path = tmp_path / "archive"
  make(path)
  with pytest.raises(errors.DataError, match=str(path)):
    cifar.verify(cifar.ARCHIVES["cifar10"], path)


def test_gigantic_file_is_not_even_hashed(tmp_path):
  path = tmp_path / "archive"
  make_gigantic(path)
  with pytest.raises(errors.DataError, match="has 1099511627776 bytes"):
    cifar.verify(cifar.ARCHIVES["cifar10"], path)


def test_file_that_may_not_be_read(small, monkeypatch):
  spec, path, _, _ = small

  def refuse(*_):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(pathlib.Path, "open", refuse)
  with pytest.raises(errors.DataError, match="Permission denied"):
    cifar.verify(spec, path)


def test_fetch(small, server, tmp_path):
  spec, path, _, _ = small
  folder, url = server
  (folder / path.name).write_bytes(path.read_bytes())
  spec = dataclasses.replace(spec, url=f"{url}/{path.name}")
  target = tmp_path / "data"
  fetched = cifar.fetch(spec, target)
  assert fetched.read_bytes() == path.read_bytes()
  # What is there already is not fetched again.
  (folder / path.name).unlink()
  assert cifar.fetch(spec, target) == fetched


def test_fetch_of_a_wrong_file_leaves_nothing(small, server, tmp_path):
  spec, path, _, _ = small
  folder, url = server
  (folder / path.name).write_bytes(b"not the archive")
  spec = dataclasses.replace(spec, url=f"{url}/{path.name}")
  target = tmp_path / "data"
  with pytest.raises(errors.DataError, match=r"dataset\.archive=FILE"):
    cifar.fetch(spec, target)
  assert list(target.iterdir()) == []


class Endless(http.server.BaseHTTPRequestHandler):
  """Answers with zeros until the other side has enough."""

  def do_GET(self):
    self.send_response(200)
    self.end_headers()
    try:
      while True:
        self.wfile.write(bytes(1 << 20))
    except OSError:
      self.close_connection = True

  def log_message(self, *_):
    pass


def test_fetch_from_a_server_without_end(small, tmp_path):
  spec, _, _, _ = small
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as httpd:
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_address[1]}/archive.tar.gz"
    target = tmp_path / "data"
    with pytest.raises(errors.DataError, match="sends more than the official"):
      cifar.fetch(dataclasses.replace(spec, url=url), target)
    gc.collect()  # Closes the response.
    httpd.shutdown()
  assert list(target.iterdir()) == []


def test_fetch_to_a_folder(small, tmp_path):
  spec, _, _, _ = small
  (tmp_path / "data" / spec.url.rsplit("/", 1)[-1]).mkdir(parents=True)
  with pytest.raises(errors.DataError, match="IsADirectoryError"):
    cifar.fetch(spec, tmp_path / "data")


def test_fetch_names_the_ways_out(small, server, tmp_path):
  spec, _, _, _ = small
  _, url = server
  spec = dataclasses.replace(spec, url=f"{url}/missing.tar.gz")
  with pytest.raises(errors.DataError) as caught:
    cifar.fetch(spec, tmp_path / "data")
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
    cifar.fetch(spec, tmp_path / "data")


def test_fetch_gives_up_on_a_silent_server(small, monkeypatch, tmp_path):
  spec, _, _, _ = small
  monkeypatch.setattr(cifar, "TIMEOUT", 0.3)
  with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    port = silent.getsockname()[1]
    spec = dataclasses.replace(spec, url=f"http://127.0.0.1:{port}/a.tar.gz")
    started = time.monotonic()
    with pytest.raises(errors.DataError, match="Timeout"):
      cifar.fetch(spec, tmp_path / "data")
    # Not a benchmark: without the limit the test would hang.
    assert time.monotonic() - started < 60
