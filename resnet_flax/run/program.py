"""What the command lines share: how they end, and the workdir.

Imports nothing that takes long: `huge_pages` starts a program anew.
"""

import os
import signal
import sys
from collections.abc import Callable
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


def run(main: Callable[[list[str]], None]) -> None:
  """Runs a command line; mistakes and signals to stop end in one line.

  SIGINT and SIGTERM end the process at once, unless `main` enters
  `interruption.StopSignals`.

  Args:
    main: called with the program's name and the arguments that are no flags.
  """
  # Not an exception: one that is raised while libraries are imported may be
  # caught there, and the signal would be lost.
  _set_handlers(_stop_at_once)
  try:
    from resnet_flax.run import command_line

    app.run(main, flags_parser=command_line.parse_flags)
  except SystemExit:
    # Nothing is left to be stopped: all was done, and the interpreter ends.
    _set_handlers(signal.SIG_IGN)
    raise
  except errors.UserError as error:
    _leave_at_once(f"error: {error}", error.exit_code)
  except KeyboardInterrupt as error:
    _stop_at_once(getattr(error, "number", signal.SIGINT), None)
  except BrokenPipeError:
    # Whoever reads our output, such as `head`, has seen enough.
    os._exit(0)


def _set_handlers(handler: Any) -> None:
  for number in (signal.SIGINT, signal.SIGTERM):
    # As a shell's background job ignores Ctrl-C.
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, handler)


def _stop_at_once(number: int, frame: FrameType | None) -> NoReturn:
  del frame
  name = signal.Signals(number).name
  text = f"error: stopped by {name}; nothing new was saved."
  _leave_at_once(text, 128 + number)


def _leave_at_once(text: str, exit_code: int) -> NoReturn:
  """Ends the process without waiting for the threads of libraries.

  XLA goes on compiling in threads of its own, and crashes if the interpreter
  is taken away from under it; Orbax's wait for minutes for a save that has
  failed. What was to be saved has been saved.
  """
  print(text, file=sys.stderr, flush=True)
  os._exit(exit_code)
