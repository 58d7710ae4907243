"""How every command line starts and ends, and the flag --workdir."""

import argparse
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


class Parser(argparse.ArgumentParser):
  """An `argparse.ArgumentParser` that raises `ConfigError` for mistakes."""

  def error(self, message: str) -> NoReturn:
    """See `argparse`."""
    raise errors.ConfigError(f"{message}. Try --help.")


def _no_flags(argv: list[str]) -> list[str]:
  # absl must parse its flags, although the command line has none of them.
  return [*flags.FLAGS(argv[:1]), *argv[1:]]


def run(
  main: Callable[[list[str]], None],
  parse: Callable[[list[str]], list[str]] = _no_flags,
) -> None:
  """Runs a command line; a mistake or a signal ends it with one line.

  Signals end it at once, unless `main` enters `signals.StopSignals`. `main`
  gets what `parse`, such as `command_line.parse_flags`, returns. By default
  this is the whole command line, for a `Parser`.
  """
  catch_signals()
  surroundings.open_streams()
  try:
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
