"""What the command lines share: how they end, and the workdir.

Imports nothing that takes long: `huge_pages` starts a program anew.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags

from resnet_flax import errors

WORKDIR = flags.DEFINE_string(
  "workdir",
  "",
  "Folder of the run. By default runs/NAME, where NAME is made of the config"
  " file's name and the overrides.",
)


def run(main: Callable[[list[str]], None]) -> None:
  """Runs a command line; mistakes and Ctrl-C end in one line.

  Args:
    main: called with the program's name and the arguments that are no flags.
  """
  try:
    from resnet_flax import command_line

    app.run(main, flags_parser=command_line.parse_flags)
  except errors.UserError as error:
    _leave_at_once(f"error: {error}", error.exit_code)
  except KeyboardInterrupt as error:
    number = signal.Signals(getattr(error, "number", signal.SIGINT))
    text = f"error: stopped by {number.name}; nothing new was saved."
    _leave_at_once(text, 128 + number)
  except BrokenPipeError:
    # Whoever reads our output, such as `head`, has seen enough.
    os._exit(0)


def _leave_at_once(text: str, exit_code: int) -> NoReturn:
  """Ends the process without waiting for the threads of libraries.

  XLA goes on compiling in threads of its own, and crashes if the interpreter
  is taken away from under it; Orbax's wait for minutes for a save that has
  failed. What was to be saved has been saved.
  """
  print(text, file=sys.stderr, flush=True)
  os._exit(exit_code)
