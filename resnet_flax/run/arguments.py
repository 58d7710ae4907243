"""Command lines with arguments that are no flags, such as PATH: by argparse."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from absl import flags

from resnet_flax.run import errors, process


class Parser(argparse.ArgumentParser):
  """An `argparse.ArgumentParser` whose mistakes are a `ConfigError`."""

  def error(self, message: str) -> NoReturn:
    """See `argparse`."""
    raise errors.ConfigError(f"{message}. Try --help.")


def run(main: Callable[[list[str]], None]) -> None:
  """`process.run` of a `main` that parses the whole command line itself."""
  # absl wants its flags to be parsed, though there are none.
  process.run(main, lambda argv: [*flags.FLAGS(argv[:1]), *argv[1:]])
