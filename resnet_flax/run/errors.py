"""Errors that a user can act on: one line each, saying what would work."""

import contextlib
import difflib
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

# pathlib would turn a URL into a local folder. TensorStore takes 'gs:' for a
# bucket and a backslash for a Windows folder, anywhere in a path.
_NOT_LOCAL = re.compile(r"^[\w+.-]+:/|gs:(/|$)|\\")
# Functions that `exit_now` calls, since it skips `atexit`'s functions.
at_end: list[Callable[[], object]] = []
LOCAL = "a local path: no URL (checkpoint.mirror is for buckets), no backslash"


class UserError(Exception):
  """A mistake or a problem that the user can fix.

  The message names the key or path, its value and what would work. The command
  line prints it without a traceback and ends with `exit_code`.
  """

  exit_code = 1

  def __init__(self, message: str):
    # A path may contain line breaks and control characters of a terminal.
    super().__init__(
      "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    )


class ConfigError(UserError, ValueError):
  """A wrong configuration value, flag or argument."""

  exit_code = 2


class DataError(UserError):
  """A data set that is missing, corrupt or of the wrong form."""


class WeightsError(UserError):
  """A file of weights that cannot be read or belongs to another network."""


class WorkdirError(UserError):
  """A workdir that cannot be read or written, is in use or is another run's."""


class NonFiniteError(UserError, ArithmeticError):
  """Training gave NaN or infinity."""


class Interrupted(UserError):
  """A signal stopped the program; the exit code is what shells expect."""

  def __init__(self, message: str, signal_number: int):
    super().__init__(message)
    self.exit_code = 128 + signal_number


@contextlib.contextmanager
def extra(name: str, what: str, advice: str = "") -> Iterator[None]:
  """Turns a failed import into a `ConfigError`: `what` needs extra `name`."""
  try:
    yield
  except ImportError as error:
    is_missing = isinstance(error, ModuleNotFoundError)
    why = "is not installed" if is_missing else f"fails ({one_line(error)})"
    raise ConfigError(
      f"{what} needs {error.name or name}, which {why}: pip install"
      f" 'resnet_flax[{name}]'.{advice}"
    ) from error


def one_line(error: BaseException) -> str:
  """An error of a library as text without line breaks: its type and message."""
  # Objects' addresses differ between two runs and do not help the reader.
  text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))
  return f"{type(error).__name__}: {text[:300]}"


def quiet(
  hook: Callable[..., Any], is_noise: Callable[[BaseException | None], bool]
) -> Callable[..., Any]:
  """Wraps `sys.excepthook` or `sys.unraisablehook` to skip some exceptions."""

  def report(*args: Any) -> None:
    error = args[1] if len(args) == 3 else args[0].exc_value
    if not is_noise(error):
      hook(*args)

  return report


def exit_with(message: str, exit_code: int) -> NoReturn:
  """Prints an error and ends the process, without waiting for threads.

  XLA's threads crash if they compile while the interpreter ends. Orbax's
  threads wait minutes for a failed save.
  """
  # The original streams. A closed one is None; print then uses sys.stdout.
  for stream in (sys.__stderr__, sys.__stdout__):
    with contextlib.suppress(OSError):  # The disk is full.
      print(f"error: {message}", file=stream, flush=True)
      break
  exit_now(exit_code)


def exit_now(exit_code: int) -> NoReturn:
  """Ends the process without a message; see `exit_with`."""
  for function in at_end:
    function()
  os._exit(exit_code)


def is_local(path: str) -> bool:
  """Whether every library takes the path as local to this machine."""
  return not _NOT_LOCAL.search(path)


def local_path(path: str | os.PathLike[str], name: str) -> pathlib.Path:
  """The path of flag or key `name`, ~ expanded; `ConfigError` if not local."""
  text = os.fspath(path)
  if not is_local(text):
    raise ConfigError(f"{name}={text} must be {LOCAL}.")
  return pathlib.Path(os.path.expanduser(text))


def resolve(path: str | os.PathLike[str], name: str = "path") -> pathlib.Path:
  """`local_path`, absolute, links resolved; bad links fail only when opened."""
  return pathlib.Path(os.path.realpath(local_path(path, name)))


def differences(
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  text: str = "{} ({!r} there, {!r} here)",
) -> list[str]:
  """One text for each key whose values differ: key, old and new value."""
  return [
    text.format(key, old.get(key), new.get(key))
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  ]


def unknown_name(what: str, name: str, known: Iterable[str]) -> ConfigError:
  """The error for an unknown value of `what`; suggests the nearest name."""
  known = sorted(known)
  if len(name) > 100:  # The comparison is quadratic in the length.
    name = f"{name[:100]}..."
  nearest = difflib.get_close_matches(name, known, n=1)
  hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
  return ConfigError(
    f"{what}={name!r} is not known.{hint} Known: {', '.join(known)}."
  )
