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
  # A handler that ends the process: what one raises while libraries are
  # imported may be caught there, and the signal would be lost.
  _set_handlers(_stop)
  try:
    from resnet_flax.run import command_line

    app.run(main, flags_parser=command_line.parse_flags)
  except SystemExit:
    _set_handlers(signal.SIG_IGN)  # All was done: nothing is left to stop.
    raise
  except errors.UserError as error:
    errors.leave(str(error), error.exit_code)
  except KeyboardInterrupt as error:
    _stop(getattr(error, "number", signal.SIGINT))
  except BrokenPipeError:
    os._exit(0)  # Whoever reads the output, such as `head`, has seen enough.


def _set_handlers(handler: Any) -> None:
  for number in (signal.SIGINT, signal.SIGTERM):
    # A shell's background job ignores Ctrl-C.
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None = None) -> NoReturn:
  del frame
  name = signal.Signals(number).name
  errors.leave(f"stopped by {name}; nothing new was saved.", 128 + number)


def use_huge_pages() -> None:
  """Starts this Python process again, with huge pages, if that helps.

  glibc takes the setting only when a process starts: must be called before
  anything is read or opened. The process keeps its number and command line.

  On a CPU every training step takes its temporary memory from the system and
  gives it back: 300 MB for ResNet-20 at batch 128, which are 75,000 page faults
  in pages of 4 KiB and a few hundred in pages of 2 MiB.
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
  """A copy of the environment in which glibc asks for huge pages.

  None if nothing need or can be done: glibc is older than 2.35, the system
  gives huge pages to all programs or to none, or the user has chosen.
  """
  library, version = libc
  numbers = [int(part) for part in version.split(".") if part.isdigit()]
  tunables = environ.get("GLIBC_TUNABLES", "")
  can_ask = library == "glibc" and numbers >= [2, 35] and "[madvise]" in mode
  if not can_ask or _HUGE_PAGES in tunables:
    return None
  tunables = ":".join(filter(None, [tunables, f"{_HUGE_PAGES}=1"]))
  return {**environ, "GLIBC_TUNABLES": tunables}
