"""Files that are there as a whole or not at all, whenever a run dies."""

import contextlib
import os
import pathlib


def write(path: pathlib.Path, content: bytes) -> None:
  """Writes a file, or leaves what was there.

  Args:
    path: of the file; another one of its name with '.tmp' is gone afterwards.
    content: all of it.

  Raises:
    OSError: it could not be written.
  """
  temporary = path.with_name(f"{path.name}.tmp")
  try:
    temporary.write_bytes(content)
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise
