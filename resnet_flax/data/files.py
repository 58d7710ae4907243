"""Opening files that somebody else has put there."""

import errno
import io
import pathlib
import stat


def open_regular(path: pathlib.Path) -> io.BufferedReader:
  """Opens a file for reading, but no pipe, which may keep one waiting.

  Raises:
    OSError: it cannot be opened, or is a folder, a pipe or a device.
  """
  if not stat.S_ISREG(path.stat().st_mode):
    raise OSError(errno.EINVAL, "not a regular file", str(path))
  return path.open("rb")


def read_text(path: pathlib.Path, limit: int = 1 << 20) -> str:
  """A small text file, UTF-8.

  Args:
    path: of the file.
    limit: how many bytes it may have.

  Raises:
    OSError: see `open_regular`.
    ValueError: too long, or not UTF-8.
  """
  with open_regular(path) as file:
    raw = file.read(limit + 1)
  if len(raw) > limit:
    raise ValueError(f"it has more than {limit} bytes")
  return raw.decode()


def resolve(path: str) -> pathlib.Path:
  """A path as users write it, absolute.

  One that cannot be resolved, for want of the user that it names or for links
  that go round in circles, is left as it is: opening it says why.
  """
  try:
    return pathlib.Path(path).expanduser().resolve()
  except (RuntimeError, OSError):
    return pathlib.Path(path).absolute()


def describe(error: OSError) -> str:
  """What went wrong, without the path, which the message has already."""
  return error.strerror or str(error)
