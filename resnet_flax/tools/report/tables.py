"""Tables for people (text, Markdown, LaTeX, HTML cells) and programs (CSV)."""

import csv
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

from resnet_flax.tools.report import runs as runs_lib

_LATEX = str.maketrans(
  {each: f"\\{each}" for each in "{}$&#%_"}
  | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}"}
  | {"~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}"}
  # LaTeX takes [ and * at the start of a row for arguments of the row before.
  | {"|": r"\textbar{}", "[": "{[}", "*": "{*}"}
)

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

Cell = str | int | float | runs_lib.Statistic | None


class Column(NamedTuple):
  """A column of a table."""

  title: str  # Its name with the unit, for example 'error (%)'.
  cells: Sequence[Cell]  # From the first row to the last.
  digits: int = 2  # Decimals shown to people; CSV has ten digits.
  rounding: float = 1e-9  # Smaller numbers are shown as zero.

  def show(self, cell: Cell) -> str:
    """Formats a cell for people."""
    if cell is None or cell != cell:  # NaN.
      return "–"
    if isinstance(cell, runs_lib.Statistic):
      std = "" if cell.std is None else f" ± {self.show(cell.std)}"
      return self.show(cell.mean) + std
    if isinstance(cell, float):
      cell = cell if abs(cell) >= self.rounding else 0.0
      text = f"{cell:.{self.digits}f}"
      # A small number must not look like zero.
      return text if float(text) or not cell else f"{cell:.1g}"
    return f"{cell:,}" if isinstance(cell, int) else cell


class Table:
  """A table of columns of the same length."""

  def __init__(
    self, name: str, caption: str, *columns: Column, folded: bool = False
  ):
    self.name = name  # The name of its files, without suffix.
    self.caption = caption  # One sentence.
    self.columns = [
      column._replace(
        title=str(_printable(column.title)),
        cells=[*map(_printable, column.cells)],
      )
      for column in columns
    ]
    # A folded table is long and rarely needed: the page opens it on a click.
    self.folded = folded

  @property
  def numeric(self) -> list[bool]:
    """Which columns hold numbers."""
    return [
      any(not isinstance(cell, str | None) for cell in column.cells)
      for column in self.columns
    ]

  def shown_rows(self) -> list[tuple[str, ...]]:
    """The titles and all rows, formatted for people."""
    shown = [[c.title, *map(c.show, c.cells)] for c in self.columns]
    return [*zip(*shown, strict=True)]

  def to_markdown(self) -> str:
    """The table in GitHub's Markdown."""
    rules = ["---:" if right else "---" for right in self.numeric]
    titles, *rows = [list(map(_escape, cells)) for cells in self.shown_rows()]
    lines = [f"| {' | '.join(cells)} |\n" for cells in (titles, rules, *rows)]
    return f"{_escape(self.caption)}\n\n{''.join(lines)}"

  def to_text(self) -> str:
    """The table for a terminal."""
    rows = self.shown_rows()
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
      for cells in self.shown_rows()
    ]
    columns = "".join("r" if right else "l" for right in self.numeric)
    begin = f"% {self.caption}\n\\begin{{tabular}}{{{columns}}}"
    end = "\\end{tabular}\n"
    return "\n".join([begin, titles, r"\hline", *rows, end])

  def to_csv(self) -> str:
    """The table for programs; a statistic takes three columns."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns: list[Sequence[Cell]] = []
    for title, cells, *_ in self.columns:
      if any(isinstance(cell, runs_lib.Statistic) for cell in cells):
        parts = zip(("mean", "std", "n"), zip(*cells, strict=True), strict=True)
        columns += [[f"{title} {part}", *values] for part, values in parts]
      else:
        columns.append([title, *cells])
    writer.writerows(
      zip(*(map(_for_programs, c) for c in columns), strict=True)
    )
    return file.getvalue()


def _printable(cell: Cell) -> Cell:
  """Escapes unprintable characters, for example in names of folders."""
  return runs_lib.shown(cell) if isinstance(cell, str) and cell else cell


def _for_programs(cell: Cell) -> Cell:
  if cell != cell:  # NaN.
    return None
  # Digits after the tenth are rounding errors.
  return f"{cell:.10g}" if isinstance(cell, float) else no_formula(cell)


def no_formula(cell: Cell) -> Cell:
  """Puts a ' before text that a spreadsheet would take for a formula."""
  if not isinstance(cell, str) or _NUMBER.fullmatch(cell):
    return cell
  return f"'{cell}" if cell.startswith((*"=+-@\t\r\n",)) else cell


def _escape(text: str) -> str:
  return re.sub(r"([\\|<>*`\[\]_&~$])", r"\\\1", text)
