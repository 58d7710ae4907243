"""Reads files that anybody may have written; writes whole files or none."""

import contextlib
import errno
import glob
import hashlib
import io
import json
import os
import pathlib
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from typing import Any

# Bytes. The digest of a larger set of images does not cover all of its bytes.
READ_WHOLE = 2**30
# The largest file of a run that is read as a whole, in bytes.
_LARGEST = 1 << 26


def open_regular(path: pathlib.Path) -> io.BufferedReader:
  """Opens a file; `OSError` for folders, devices and pipes, which may block."""
  if not stat.S_ISREG(path.stat().st_mode):
    raise OSError(errno.EINVAL, "not a regular file", str(path))
  return path.open("rb")


def read_bytes(path: pathlib.Path, limit: int = _LARGEST) -> bytes:
  """The content of a regular file; `ValueError` above `limit` bytes."""
  with open_regular(path) as file:
    if os.fstat(file.fileno()).st_size > limit:
      raise ValueError(f"it has more than {limit} bytes")
    return file.read()


def read_text(path: pathlib.Path, limit: int = 1 << 20) -> str:
  """`read_bytes` as text, which must be UTF-8."""
  return read_bytes(path, limit).decode()


def digest_of(path: pathlib.Path) -> str:
  """The SHA-256 of a regular file; may raise OSError."""
  with open_regular(path) as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def parse_object(content: bytes) -> dict[str, Any]:
  """Parses a JSON object; raises `ValueError` for anything else."""
  try:
    value = json.loads(content)
  except RecursionError:
    raise ValueError("it is nested too deeply") from None
  if not isinstance(value, dict):
    raise ValueError("it is not a JSON object")
  return value


@contextlib.contextmanager
def temporary_folder(
  parent: pathlib.Path, prefix: str, seconds: float = 0.0
) -> Iterator[pathlib.Path]:
  """Yields a new folder; first removes folders that killed processes left.

  Folders of this prefix count as left if they are older than `seconds`. So only
  one process at a time may use a prefix, or each must finish within `seconds`.
  """
  # Python adds eight characters; a name with more has another, longer prefix.
  for leftover in parent.glob(f"{glob.escape(prefix)}{'?' * 8}"):
    with contextlib.suppress(OSError):  # Another process removes it, too.
      if time.time() - leftover.stat().st_mtime >= seconds:
        shutil.rmtree(leftover)
  with tempfile.TemporaryDirectory(
    prefix=prefix, dir=parent, ignore_cleanup_errors=True
  ) as name:
    yield pathlib.Path(name)


def write_file(path: pathlib.Path, content: bytes) -> None:
  """Writes a file whole, or leaves the old one; may raise OSError."""
  temporary = path.with_name(f"{path.name}.tmp")
  try:
    # A killed run or a stranger may have left a file or a link here.
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
      file.write(content)
      # Otherwise a power cut may leave an empty file under the final name.
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file whole or not at all."""
  write_file(path, (json.dumps(value, indent=2) + "\n").encode())
