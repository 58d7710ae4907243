"""Cells and tables, and their place in Markdown files, between markers."""

import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def enclosing(name: str, command: str) -> tuple[str, str]:
  """The markers before and after a table that a command writes."""
  return f"<!-- {name}: made by {command} -->", f"<!-- end of {name} -->"


def replace(text: str, name: str, command: str, table: str) -> str:
  """The text of a file with `table` between the markers.

  Raises `ValueError` if the markers are missing.
  """
  start, end = enclosing(name, command)
  before, found, rest = text.partition(start)
  _, found_end, after = rest.partition(end)
  if not found or not found_end:
    raise ValueError(f"{start} ... {end} is missing")
  return f"{before}{start}\n\n{table}\n\n{end}{after}"


def update(path: pathlib.Path, name: str, command: str, table: str) -> None:
  """Replaces one table of a file; see `replace`."""
  path.write_text(replace(path.read_text(), name, command, table))


def row(cells: Iterable[Any]) -> str:
  """Formats a row of a table."""
  return f"| {' | '.join(map(str, cells))} |"


def table(titles: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
  """Formats a table, without a last line break."""
  return "\n".join([row(titles), row(["---"] * len(titles)), *map(row, rows)])


def mean_and_std(values: Sequence[float], form: str) -> str:
  """Formats 'mean ± sample standard deviation'; one value has none."""
  if not values:
    return "–"
  std = f" ± {statistics.stdev(values):{form}}" if values[1:] else ""
  return f"{statistics.mean(values):{form}}{std}"


def spread(values: Sequence[float], form: str) -> str:
  """Formats 'median (least–most)', or a dash if there is no value."""
  if not values:
    return "–"
  median = statistics.median(values)
  return f"{median:{form}} ({min(values):{form}}–{max(values):{form}})"


def spread_table(rows: Iterable[tuple[str, Sequence[float], str]]) -> str:
  """Formats a table of medians, with the least and the most.

  A row has the measurement's name with its unit, the values, and the format of
  a number.
  """
  cells = [
    (name, *(f"{of(values):{form}}" for of in (statistics.median, min, max)))
    for name, values, form in rows
  ]
  return table(("measurement", "median", "least", "most"), cells)
