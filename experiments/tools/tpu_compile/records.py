"""The file of results to which each command adds a record."""

import pathlib
from collections.abc import Sequence

from experiments.tools import records as records_lib
from experiments.tools.records import Record


def arguments(argv: Sequence[str]) -> list[str]:
  """The arguments of a command line that define the program."""
  return [each for each in argv[1:] if each.lstrip("-").startswith("config")]


def read(path: pathlib.Path) -> list[Record]:
  """The results so far; an absent file has none."""
  return records_lib.read(path, "topology", "arguments")


def add(path: pathlib.Path, result: Record) -> None:
  """Adds a result, or replaces one of the same arguments and topology."""

  def key(record: Record) -> tuple[str, list[str]]:
    return record["topology"], record["arguments"]

  results = {str(key(each)): each for each in [*read(path), result]}
  path.parent.mkdir(parents=True, exist_ok=True)
  records_lib.write(path, results.values())
