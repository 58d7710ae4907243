"""Shows the cells' progress: a table on a terminal, lines elsewhere."""

import dataclasses
import enum
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from experiments.tools.sweep import task
from experiments.tools.sweep.definition import Cell
from resnet_flax.run import checkpoint, errors, folder as workdir_lib, metrics

_COLUMNS = (
  *("state", "tries", "epochs", "test accuracy", "best", "images/s", "left"),
  "cell",
)


class State(enum.StrEnum):
  """The state of a cell; a terminal shows the states in this order."""

  RUNNING = enum.auto()
  FAILED = enum.auto()
  STOPPED = enum.auto()
  WAITING = enum.auto()
  FINISHED = enum.auto()


@dataclasses.dataclass(frozen=True)
class Status:
  """The progress of a cell, read from its files."""

  state: State
  tries: int  # Number of times this sweep has started it.
  num_epochs: int  # Of the whole run.
  records: Sequence[metrics.Record]  # Of the finished epochs.
  best: metrics.Record | None
  left: str  # The remaining time that its log states; '' if there is none.

  def row(self, name: str) -> tuple[str, ...]:
    """Makes its row of the table."""
    last = self.records[-1] if self.records else None
    return (
      self.state,
      str(self.tries or ""),
      f"{len(self.records)}/{self.num_epochs}",
      _accuracy(last),
      _accuracy(self.best),
      f"{last['images_per_second']:.0f}" if last else "",
      self.left,
      name,
    )

  def line(self, name: str) -> str:
    """Makes its line of the log."""
    parts = [str(self.state), f"epochs {len(self.records)}/{self.num_epochs}"]
    if self.tries > 1:
      parts[0] += f" (try {self.tries})"
    if self.records:
      last = self.records[-1]
      parts.append(f"test accuracy {_accuracy(last)}")
      parts.append(f"{last['images_per_second']:.0f} images/s")
    if self.left:
      parts.append(f"{self.left} left")
    return f"{name}: {', '.join(parts)}"


def is_finished(cell: Cell) -> bool:
  """Whether all epochs of a cell are finished.

  Raises `WorkdirError` if its workdir holds a run of another configuration.
  """
  if not (cell.workdir / "config.json").exists():
    return False
  try:
    workdir_lib.check_same(cell.workdir, cell.config)
  except errors.WorkdirError as error:
    raise errors.WorkdirError(f"cell {cell.name}: {error}") from error
  records = metrics.MetricsLog(cell.workdir).read()
  if len(records) != cell.config.num_epochs:
    return False
  # A killed run may have its last record without the checkpoint. A run whose
  # checkpoints were removed cannot resume, and is finished.
  before, last = [0, *(record["step"] for record in records)][-2:]
  latest = max(checkpoint.steps(cell.workdir), default=-1)
  return not before <= latest < last


class Observer:
  """Reads the progress of cells, from now on."""

  def __init__(self, cells: Iterable[Cell]):
    # An earlier sweep's lines in a log do not count.
    self._seen = {
      cell.name: cell.log.stat().st_size if cell.log.exists() else 0
      for cell in cells
    }

  def status(self, cell: Cell, ended: State | None) -> Status:
    """A cell's progress; `ended` is its final state, None before its end."""
    log = self._log(cell)
    tries = len(re.findall(f"^{task.STARTED}", log, re.MULTILINE))
    records = metrics.MetricsLog(cell.workdir).read()
    monitor = cell.config.checkpoint.monitor
    left = ""
    if ended is None:
      times_left = re.findall(r"(\S.*) left$", log, re.MULTILINE)
      left = re.split("[,;] ", times_left[-1])[-1] if times_left else ""
    return Status(
      state=ended or (State.RUNNING if tries else State.WAITING),
      tries=tries,
      num_epochs=cell.config.num_epochs,
      records=records,
      best=metrics.best_record(records, monitor) if records else None,
      left=left,
    )

  def last_line(self, cell: Cell) -> str:
    """The last line of a cell's log; after a failure it gives the reason."""
    lines = [line for line in self._log(cell).splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""

  def _log(self, cell: Cell) -> str:
    if not cell.log.exists():
      return ""
    with cell.log.open("rb") as file:
      file.seek(self._seen[cell.name])
      return file.read().decode(errors="replace")


class Overview:
  """Shows the progress of all cells while they run; a context manager.

  A terminal shows a table that is redrawn; another console gets a line when a
  cell's state, tries or epochs change.
  """

  def __init__(self, console: Console | None = None):
    self._console = console or Console(file=sys.stderr, soft_wrap=True)
    # The table is removed at the end, when the final table is printed.
    self._live = Live(console=self._console, auto_refresh=False, transient=True)
    self._shown: dict[str, tuple[Any, ...]] = {}

  def show(self, statuses: Mapping[str, Status]) -> None:
    """Shows the cells' states, by name."""
    if self._console.is_terminal:
      # Running cells come first, as the window may be too low for all cells.
      order = list(State)
      rows = sorted(
        statuses.items(), key=lambda item: order.index(item[1].state)
      )
      text = f"{summary(statuses.values())}\n{table(dict(rows))}"
      self._live.update(
        Text(text, no_wrap=True, overflow="ellipsis"), refresh=True
      )
      return
    for name, status in statuses.items():
      now = (status.state, status.tries, len(status.records))
      if self._shown.get(name) != now:
        self._shown[name] = now
        print(status.line(name), file=self._console.file, flush=True)

  def __enter__(self) -> "Overview":
    if self._console.is_terminal:
      self._live.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._live.stop()


def summary(statuses: Iterable[Status]) -> str:
  """Counts the cells in each state, in a line."""
  states = [status.state for status in statuses]
  counts = ", ".join(
    f"{states.count(state)} {state}" for state in State if state in states
  )
  return f"{len(states)} cells: {counts}"


def table(statuses: Mapping[str, Status]) -> str:
  """Makes a table of the cells by name."""
  return align(
    [_COLUMNS, *(status.row(name) for name, status in statuses.items())]
  )


def align(rows: Sequence[Sequence[str]]) -> str:
  """Aligns rows of text in columns; the last column is not padded."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  widths[-1] = 0
  return "\n".join(
    "  ".join(
      cell.ljust(width) for cell, width in zip(row, widths, strict=True)
    ).rstrip()
    for row in rows
  )


def _accuracy(record: metrics.Record | None) -> str:
  """Formats test accuracy; several seeds give mean and standard deviation."""
  if record is None:
    return ""
  if "test_accuracy" not in record:  # The epoch was not evaluated.
    return "–"
  text = f"{record['test_accuracy']:.4f}"
  if "test_accuracy_std" in record:
    text += f" ± {record['test_accuracy_std']:.4f}"
  return text
