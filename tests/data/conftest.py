import functools
import http.server
import threading

import numpy as np
import pytest


@pytest.fixture
def arrays(random_images):
  """Six training images and three test images, all different."""
  return {
    "train_images": random_images(6),
    "train_labels": np.arange(6, dtype=np.int32),
    "test_images": random_images(3),
    "test_labels": np.arange(3, dtype=np.int32),
    "class_names": np.array([*"abcdef"]),
  }


@pytest.fixture
def server(tmp_path, monkeypatch):
  """A folder that is served on this machine, and its address."""
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  folder = tmp_path / "served"
  folder.mkdir()
  handler = functools.partial(
    http.server.SimpleHTTPRequestHandler, directory=str(folder)
  )
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
