"""What command lines share: how they start and end, and the workdir."""

import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TextIO

from absl import app, flags

from resnet_flax.run import errors, signals

WORKDIR = flags.DEFINE_string(
  "workdir",
  "",
  "Folder of the run. By default runs/NAME, where NAME is made of the config"
  " file's name and the overrides.",
)


def run(main: Callable[[list[str]], None]) -> None:
  """Runs a command line; mistakes and signals to stop end in one line.

  Signals end the process at once, unless `main` enters `signals.StopSignals`.

  Args:
    main: called with the program's name and the arguments that are no flags.
  """
  # A handler that ends the process: what one raises while libraries are
  # imported may be caught there, and the signal would be lost.
  _set_handlers(_stop)
  _open_streams()
  try:
    from resnet_flax.run import command_line

    app.run(main, flags_parser=command_line.parse_flags)
  except SystemExit:
    _set_handlers(signal.SIG_IGN)  # All was done: nothing is left to stop.
    try:
      sys.stderr.flush()
    except OSError:  # Full: Python would end with a code of its own.
      sys.stderr = _nowhere()
    raise
  except errors.UserError as error:
    errors.leave(str(error), error.exit_code)
  except KeyboardInterrupt as error:
    _stop(getattr(error, "number", signal.SIGINT))
  except BrokenPipeError:
    os._exit(0)  # Whoever reads the output, such as `head`, has seen enough.
  except (RuntimeError, AssertionError):
    _check_platform()
    raise


def show(text: str) -> None:
  """Prints what a command has found.

  Raises:
    UserError: standard output cannot be written, as on a full disk.
  """
  try:
    print(text, flush=True)
  except BrokenPipeError:
    raise
  except OSError as error:
    raise errors.UserError(
      f"standard output cannot be written: {error.strerror}. What was done is"
      " complete; send the output elsewhere to see it."
    ) from error


def _open_streams() -> None:
  """Sees that whatever is printed later can be."""
  # Where one is closed, a file opened later would get its number, and with it
  # what libraries print.
  sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="replace")


def _nowhere() -> TextIO:
  return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def _check_platform() -> None:
  """Says so if JAX cannot have the devices that it is asked for."""
  import jax

  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:
    errors.leave(
      f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: JAX finds no such"
      f" device ({errors.one_line(error)}). Install its extra,"
      " 'resnet_flax[cuda]' or 'resnet_flax[tpu]', or set JAX_PLATFORMS=cpu.",
      1,
    )


def _set_handlers(handler: Any) -> None:
  for number in signals.SIGNALS:
    # A shell's background job ignores Ctrl-C.
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None = None) -> NoReturn:
  del frame
  name = signal.Signals(number).name
  errors.leave(f"stopped by {name}; nothing new was saved.", 128 + number)
