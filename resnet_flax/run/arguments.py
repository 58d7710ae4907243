"""Command lines with positional arguments, such as PATH, by argparse."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from absl import flags

from resnet_flax.run import errors, process


class Parser(argparse.ArgumentParser):
  """An `argparse.ArgumentParser` that raises `ConfigError` for mistakes."""

  def error(self, message: str) -> NoReturn:
    """See `argparse`."""
    raise errors.ConfigError(f"{message}. Try --help.")


def run(main: Callable[[list[str]], None]) -> None:
  """Calls `process.run` for a `main` that parses its whole command line."""
  # absl must parse its flags, although the command line has none of them.
  process.run(main, lambda argv: [*flags.FLAGS(argv[:1]), *argv[1:]])
