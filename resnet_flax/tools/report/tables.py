"""Tables for people: text, Markdown, LaTeX, HTML cells; for programs: CSV."""

import csv
import dataclasses
import io
import re
from collections.abc import Callable, Iterable
from typing import Any

from resnet_flax.tools.report import runs as runs_lib

_LATEX = str.maketrans(
  {each: f"\\{each}" for each in "{}$&#%_"}
  | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}"}
  | {"~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}"}
  # At the start of a row the last two would be arguments of the row before.
  | {"|": r"\textbar{}", "[": "{[}", "*": "{*}"}
)

Cell = str | int | float | runs_lib.Statistic | None


@dataclasses.dataclass(frozen=True)
class Column:
  """One column."""

  title: str  # Its name with the unit, for example 'error (%)'.
  cell: Callable[[Any], Cell]  # Of the item that a row is about.
  digits: int = 0  # Decimals of a number, for people; CSV has ten digits.
  # Whether its cells are statistics; CSV has three columns of them.
  statistic: bool = False

  def show(self, cell: Cell) -> str:
    """A cell as people read it."""
    if cell is None:
      return "–"
    if isinstance(cell, runs_lib.Statistic):
      std = "" if cell.std is None else f" ± {cell.std:.{self.digits}f}"
      return f"{cell.mean:.{self.digits}f}{std}"
    if isinstance(cell, float):
      return f"{cell:.{self.digits}f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


class Table:
  """A table: one row for each item."""

  def __init__(
    self,
    name: str,
    caption: str,
    items: Iterable[Any],
    *columns: Column,
    folded: bool = False,
  ):
    self.name = name  # Of its files, without suffix.
    self.caption = caption  # One sentence.
    self.titles = [column.title for column in columns]
    self.columns = columns
    self.rows = [
      [_printable(column.cell(item)) for column in columns] for item in items
    ]
    # It is long, and of use to few: the page shows it when asked to.
    self.folded = folded

  @property
  def numeric(self) -> list[bool]:
    """Which columns hold numbers."""
    return [
      any(not isinstance(row[position], str | None) for row in self.rows)
      for position in range(len(self.columns))
    ]

  def shown_rows(self) -> list[list[str]]:
    """All cells as people read them."""
    return [
      [c.show(cell) for c, cell in zip(self.columns, row, strict=True)]
      for row in self.rows
    ]

  def to_markdown(self) -> str:
    """The table in GitHub's Markdown."""
    rules = ["---:" if right else "---" for right in self.numeric]
    titles, *rows = [
      [_escape(cell) for cell in row]
      for row in (self.titles, *self.shown_rows())
    ]
    lines = [f"| {' | '.join(cells)} |\n" for cells in (titles, rules, *rows)]
    return f"{_escape(self.caption)}\n\n{''.join(lines)}"

  def to_text(self) -> str:
    """The table for a terminal."""
    rows = [self.titles, *self.shown_rows()]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    form = "  ".join(
      f"{{:{'>' if right else '<'}{width}}}"
      for right, width in zip(self.numeric, widths, strict=True)
    )
    lines = [form.format(*cells).rstrip() for cells in rows]
    return "\n".join([f"{self.caption}:", *lines, ""])

  def to_latex(self) -> str:
    """The table as a `tabular`, which needs no package."""
    titles, *rows = [
      " & ".join(cell.translate(_LATEX) for cell in cells) + r" \\"
      for cells in (self.titles, *self.shown_rows())
    ]
    columns = "".join("r" if right else "l" for right in self.numeric)
    begin = f"% {self.caption}\n\\begin{{tabular}}{{{columns}}}"
    end = "\\end{tabular}\n"
    return "\n".join([begin, titles, r"\hline", *rows, end])

  def to_csv(self) -> str:
    """The table for programs: statistics take three columns."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    titles: list[str] = []
    for column in self.columns:
      parts = (" mean", " std", " n") if column.statistic else ("",)
      titles += [column.title + part for part in parts]
    writer.writerow(titles)
    for row in self.rows:
      cells: list[Any] = []
      for column, cell in zip(self.columns, row, strict=True):
        if isinstance(cell, runs_lib.Statistic):
          cells += cell
        else:
          cells += [None, None, 0] if column.statistic else [cell]
      writer.writerow(
        # Ten digits: the others are rounding errors.
        [f"{c:.10g}" if isinstance(c, float) else no_formula(c) for c in cells]
      )
    return file.getvalue()


def _printable(cell: Cell) -> Cell:
  """Names of folders, classes and processors may hold any character."""
  return runs_lib.shown(cell) if isinstance(cell, str) and cell else cell


def no_formula(cell: Cell) -> Cell:
  """What a spreadsheet would take for a formula becomes a text there."""
  is_one = isinstance(cell, str) and cell.startswith((*"=+-@\t\r\n",))
  return f"'{cell}" if is_one else cell


def _escape(text: str) -> str:
  return re.sub(r"([\\|<>*`\[\]])", r"\\\1", text)
