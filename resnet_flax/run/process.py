"""How every command line starts and ends, and the flag --workdir."""

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from absl import app, flags

from resnet_flax.run import errors, signals, surroundings

WORKDIR = flags.DEFINE_string(
  "workdir",
  "",
  "Folder of the run. By default runs/NAME, where NAME is made of the config"
  " file's name and the overrides.",
)


def run(
  main: Callable[[list[str]], None],
  parse: Callable[[list[str]], list[str]] | None = None,
) -> None:
  """Runs a command line; a mistake or a signal ends it with one line.

  Signals end it at once, unless `main` enters `signals.StopSignals`. `parse` is
  by default `command_line.parse_flags`; `main` gets the list that it returns.
  """
  catch_signals()
  surroundings.open_streams()
  try:
    if parse is None:
      from resnet_flax.run import command_line

      parse = command_line.parse_flags
    app.run(main, flags_parser=parse)
  except SystemExit:
    _set_handlers(signal.SIG_IGN)  # The work is done: nothing is left to stop.
    try:
      sys.stderr.flush()
    except OSError:
      sys.stderr = None  # The disk is full: Python would change the exit code.
    raise
  except errors.UserError as error:
    errors.exit_with(str(error), error.exit_code)
  except KeyboardInterrupt as error:
    _stop(getattr(error, "number", signal.SIGINT))
  except BrokenPipeError:
    errors.exit_now(0)  # The reader of the output, such as `head`, closed it.
  except (RuntimeError, AssertionError):
    surroundings.check_platform()
    raise


def catch_signals() -> None:
  """Makes signals end the process with one line, even during an import."""
  # The handler itself ends the process. If it raised an exception, a library
  # that is being imported might catch it, and the signal would be lost.
  _set_handlers(_stop)


def _set_handlers(handler: Any) -> None:
  for number in signals.SIGNALS:
    # Ignored signals stay ignored, such as Ctrl-C in a shell's background job.
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None = None) -> NoReturn:
  del frame
  name = signal.Signals(number).name
  errors.exit_with(f"stopped by {name}; nothing new was saved.", 128 + number)
