"""Files that are there as a whole or not at all, whenever a run dies."""

import contextlib
import json
import os
import pathlib
from typing import Any


def write_file(path: pathlib.Path, content: bytes) -> None:
  """Writes a file whole, or leaves what was there; may raise OSError."""
  temporary = path.with_name(f"{path.name}.tmp")
  try:
    temporary.write_bytes(content)
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file whole or not at all."""
  write_file(path, (json.dumps(value, indent=2) + "\n").encode())
