"""Files that are there as a whole or not at all, whenever a run dies."""

import contextlib
import json
import os
import pathlib
from typing import Any

from resnet_flax.data import prepared

# The largest file of a run that is read as a whole, in bytes.
_LARGEST = 1 << 26


def read_bytes(path: pathlib.Path) -> bytes:
  """What a file holds.

  Raises:
    OSError: there is none, or it is a folder, a pipe or a device.
    ValueError: it is larger than any file that a run writes.
  """
  with prepared.open_regular(path) as file:
    content = file.read(_LARGEST + 1)
  if len(content) > _LARGEST:
    raise ValueError(f"it has more than {_LARGEST} bytes")
  return content


def parse_object(content: bytes) -> dict[str, Any]:
  """The JSON object that some bytes are; otherwise a `ValueError`."""
  try:
    value = json.loads(content)
  except RecursionError:
    raise ValueError("it is nested too deeply") from None
  if not isinstance(value, dict):
    raise ValueError("it holds no JSON object")
  return value


def no_link(path: str, flags: int) -> int:
  """Opens a file that is no symbolic link, for `open(opener=...)`.

  Raises:
    OSError: it is one, or cannot be opened.
  """
  return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_file(path: pathlib.Path, content: bytes) -> None:
  """Writes a file whole, or leaves what was there; may raise OSError."""
  temporary = path.with_name(f"{path.name}.tmp")
  try:
    # What is there, a link perhaps, was left by a killed run or by a stranger.
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
      file.write(content)
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file whole or not at all."""
  write_file(path, (json.dumps(value, indent=2) + "\n").encode())
