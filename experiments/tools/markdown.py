"""Cells and tables, and their place in Markdown files, between markers."""

import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def enclosing(name: str, command: str) -> tuple[str, str]:
  """Makes the markers before and after a table.

  Args:
    name: name of the table.
    command: the command that writes it.
  """
  return f"<!-- {name}: made by {command} -->", f"<!-- end of {name} -->"


def replace(text: str, name: str, command: str, table: str) -> str:
  """Returns a file's text with another table between the markers.

  Args:
    text: text of the file.
    name: name of the table.
    command: the command that writes it.
    table: the new table, in Markdown.

  Raises:
    ValueError: the markers are missing.
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
  middle, least, most = (
    format(number, form)
    for number in (statistics.median(values), min(values), max(values))
  )
  return f"{middle} ({least}–{most})"


def spread_table(rows: Iterable[tuple[str, Sequence[float], str]]) -> str:
  """Makes a Markdown table of medians, with the least and the most.

  Args:
    rows: for each row the measurement's name with its unit, the values, and the
      format of a number.
  """
  cells = []
  for name, values, form in rows:
    numbers = (statistics.median(values), min(values), max(values))
    cells.append([name, *(format(number, form) for number in numbers)])
  return table(("measurement", "median", "least", "most"), cells)
