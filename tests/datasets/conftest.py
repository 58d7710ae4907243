import functools
import http.server
import threading

import pytest


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
