"""What command lines share: how they start and end, and the workdir.

Imports nothing that takes long, since `use_huge_pages` starts a process anew.
"""

import os
import pathlib
import platform
import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn

from absl import app, flags

from resnet_flax.run import errors

WORKDIR = flags.DEFINE_string(
  "workdir",
  "",
  "Folder of the run. By default runs/NAME, where NAME is made of the config"
  " file's name and the overrides.",
)

_HUGE_PAGES = "glibc.malloc.hugetlb"


def run(main: Callable[[list[str]], None]) -> None:
  """Runs a command line; mistakes and signals to stop end in one line.

  SIGINT and SIGTERM end the process at once, unless `main` enters
  `signals.StopSignals`.

  Args:
    main: called with the program's name and the arguments that are no flags.
  """
  # Not an exception: one that is raised while libraries are imported may be
  # caught there, and the signal would be lost.
  _set_handlers(_stop)
  try:
    from resnet_flax.run import command_line

    app.run(main, flags_parser=command_line.parse_flags)
  except SystemExit:
    # Nothing is left to be stopped: all was done, and the interpreter ends.
    _set_handlers(signal.SIG_IGN)
    raise
  except errors.UserError as error:
    errors.leave(str(error), error.exit_code)
  except KeyboardInterrupt as error:
    _stop(getattr(error, "number", signal.SIGINT), None)
  except BrokenPipeError:
    # Whoever reads the output, such as `head`, has seen enough.
    os._exit(0)


def _set_handlers(handler: Any) -> None:
  for number in (signal.SIGINT, signal.SIGTERM):
    # A shell's background job ignores Ctrl-C.
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
  del frame
  name = signal.Signals(number).name
  errors.leave(f"stopped by {name}; nothing new was saved.", 128 + number)


def use_huge_pages() -> None:
  """Starts this Python process again, with huge pages, if that helps.

  Must be called first, while nothing has been read or opened: glibc takes the
  setting only when a process starts. The process keeps its number, its files
  and its command line.

  A training step's temporary memory on a CPU is taken from and given back to
  the system at every step: 300 MB for ResNet-20 at batch 128, which are 75,000
  page faults in pages of 4 KiB and a few hundred in pages of 2 MiB.
  """
  path = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
  try:
    mode = path.read_text()
  except OSError:
    return  # Another system than Linux, or one without huge pages.
  environ = environment_with_huge_pages(os.environ, platform.libc_ver(), mode)
  if environ is not None:
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)


def environment_with_huge_pages(
  environ: Mapping[str, str], libc: tuple[str, str], mode: str
) -> dict[str, str] | None:
  """The environment in which glibc asks for huge pages.

  Returns:
    A changed copy; None if nothing need or can be done: glibc is older than
    2.35, the system gives huge pages to all programs or to none, or the user
    has chosen.
  """
  library, version = libc
  numbers = [int(part) for part in version.split(".") if part.isdigit()]
  tunables = environ.get("GLIBC_TUNABLES", "")
  if (
    library != "glibc"
    or numbers < [2, 35]
    or "[madvise]" not in mode
    or _HUGE_PAGES in tunables
  ):
    return None
  tunables = ":".join(filter(None, [tunables, f"{_HUGE_PAGES}=1"]))
  return {**environ, "GLIBC_TUNABLES": tunables}
