"""Errors that a user can act on: one line each, saying what would work."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """A mistake or a circumstance that the user can mend.

  The message is one line that names the key or the path, the value found and
  what would work. The command line prints it without a traceback and ends
  with `exit_code`.
  """

  exit_code = 1

  def __init__(self, message: str):
    # A path may hold line breaks and a terminal's control characters.
    super().__init__(_printable(message))


class ConfigError(UserError, ValueError):
  """A configuration value that cannot be used."""

  exit_code = 2


class DataError(UserError):
  """A data set that is missing, corrupt or of the wrong form."""


class WeightsError(UserError):
  """A file of weights that cannot be read or is of another network."""


class WorkdirError(UserError):
  """A workdir that cannot be written or belongs to another experiment."""


class NonFiniteError(UserError, ArithmeticError):
  """Training produced a NaN or an infinity.

  Args:
    message: what is not finite, and what would help.
    step: the 0-based step after which it was found.
    seed: of the network.
  """

  def __init__(self, message: str, step: int, seed: int):
    super().__init__(message)
    self.step = step
    self.seed = seed


class Interrupted(UserError):
  """A signal, such as that of Ctrl-C, stopped the program.

  Args:
    message: what was saved and how to go on.
    signal_number: the signal's; gives the exit code that shells expect.
  """

  def __init__(self, message: str, signal_number: int):
    super().__init__(message)
    self.exit_code = 128 + signal_number


def _printable(text: str) -> str:
  if text.isprintable():
    return text
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
  """Another library's error as part of a line: its kind and what it says."""
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text[:300]}"


def unknown_name(what: str, name: str, known: Iterable[str]) -> ConfigError:
  """The error for a name that is not among the known ones.

  Args:
    what: what kind of name it is, for example `model.name`.
    name: the name that was given.
    known: the names that would work.

  Returns:
    A `ConfigError` listing the known names, with the nearest suggested.
  """
  known = sorted(known)
  # Comparing takes the square of the length.
  name = name if len(name) <= 100 else f"{name[:100]}..."
  nearest = difflib.get_close_matches(name, known, n=1)
  hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
  return ConfigError(
    f"{what}={name!r} is not known.{hint} Known: {', '.join(known)}."
  )
