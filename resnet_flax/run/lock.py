"""One process at a time on a workdir."""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any, TextIO

from resnet_flax.run import errors

_logger = logging.getLogger(__name__)

# What flock says on file systems that have no locks, as some in networks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def exclusive(workdir: pathlib.Path) -> Iterator[None]:
  """Holds `workdir`/lock, which says who has it, and removes it at the end.

  The operating system gives the lock back when a process ends in any way, so
  a file that a killed one left behind does not hold up the next.

  Args:
    workdir: an existing folder.

  Raises:
    WorkdirError: another process has it; says which, on which host, since
      when. Or it cannot be opened.
  """
  path = workdir / "lock"
  try:
    file = _acquire(path)
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise errors.WorkdirError(
        f"{path} cannot be locked: {error.strerror}. See that it can be"
        " written, or pass another --workdir."
      ) from error
    _logger.warning(
      "warning: %s cannot be locked (%s): see that no other process uses this"
      " workdir",
      path,
      error.strerror,
    )
    yield
    return
  with file:
    before = _read(file)
    if before:
      _logger.info(
        "taking over the lock of %s, which has ended", _describe(before)
      )
    owner = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    file.seek(0)
    file.truncate()
    json.dump(owner, file)
    file.flush()
    try:
      yield
    finally:
      # While it is held: whoever waits for this file notices that it is gone.
      with contextlib.suppress(OSError):
        path.unlink()


def _acquire(path: pathlib.Path) -> TextIO:
  while True:
    file = path.open("a+")
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      # Its holder may have removed it since it was opened.
      if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        return file
    except BlockingIOError:
      owner = _describe(_read(file))
      file.close()
      raise errors.WorkdirError(
        f"workdir {path.parent} is in use by {owner}. Wait for it or stop it,"
        " or pass another --workdir."
      ) from None
    except FileNotFoundError:
      pass
    except OSError:
      file.close()
      raise
    file.close()


def _read(file: TextIO) -> dict[str, Any]:
  file.seek(0)
  try:
    owner = json.loads(file.read())
  except ValueError:
    return {}  # Empty, or being written.
  return owner if isinstance(owner, dict) else {}


def _describe(owner: dict[str, Any]) -> str:
  if not owner:
    return "another process"
  return (
    f"process {owner.get('pid')} on {owner.get('host')} since"
    f" {owner.get('since')}"
  )
