"""The test of one fault: the job that it hits, and the results."""

import dataclasses
import functools
import pathlib
import shutil
import signal
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.faults import harness
from experiments.tools import markdown
from resnet_flax.run import errors


class Job:
  """A command with its undisturbed run and a half-done run.

  `folder` is for the workdirs and the data cache. The half-done run is killed
  at the checkpoint of step `half_done`.
  """

  def __init__(
    self, folder: pathlib.Path, arguments: tuple[str, ...], half_done: int
  ):
    folder.mkdir()
    self._folder = folder
    self._half_done = half_done
    self._num_workdirs = 0
    self.cache = folder / "cache"
    self.arguments = [*arguments, f"--config.dataset.cache_dir={self.cache}"]

  def new_workdir(self) -> pathlib.Path:
    """Names a workdir that does not exist yet."""
    self._num_workdirs += 1
    return self._folder / f"run{self._num_workdirs}"

  @functools.cached_property
  def reference(self) -> "Reference":
    """The undisturbed run."""
    workdir = self.new_workdir()
    process = harness.Process(self.arguments, workdir)
    process.wait_until(process.is_compiled)
    compiled_after = process.age
    ended = process.end()
    if ended.code:
      raise RuntimeError("".join(ended.lines))
    return Reference(compiled_after, ended.seconds, harness.results(workdir))

  @functools.cached_property
  def _template(self) -> tuple[pathlib.Path, int]:
    workdir = self.new_workdir()
    # The undisturbed run fills the data cache before any disturbed run.
    assert self.reference
    process = harness.Process(self.arguments, workdir)
    process.wait_until(lambda: process.has_saved(self._half_done))
    process.send(signal.SIGKILL)
    process.end()
    return workdir, process.pid

  def half_done(self, workdir: pathlib.Path) -> int:
    """Makes a workdir in the state that a killed run leaves.

    Gives the process ID of that run, whose lock is still in the workdir.
    """
    template, pid = self._template
    shutil.copytree(template, workdir)
    return pid


class Reference(NamedTuple):
  """The undisturbed run: its compile time, its total time and its results."""

  seconds_to_compiled: float
  seconds: float
  results: dict[str, Any]


class Case:
  """The test of one fault: its actions, its outcome and its problems."""

  def __init__(self, job: Job, rng: np.random.Generator):
    self.job = job
    self.workdir = job.new_workdir()  # It does not exist at first.
    self.extra: list[str] = []  # Arguments of the command, after the job's.
    self.rng = rng  # Draws the random choices of the fault.
    self.injected = 1  # Number of injections.
    self.attempts: list[dict[str, Any]] = []  # All starts, as JSON.
    self.problems: list[str] = []  # Unexpected results, in words.
    self.notes: list[str] = []  # Remarks for the table.
    self.messages: list[str] = []  # Standard error of all starts.
    # The sum over all finished runs; None without one.
    self.different_bytes: int | None = None
    self._done: list[str] = []

  @property
  def outcome(self) -> str:
    """The checked results in words, each once, in the order of events."""
    return ", ".join(dict.fromkeys(self._done))

  def expect(self, holds: bool, problem: str) -> None:
    """Records a problem unless the condition holds."""
    if not holds:
      self.problems.append(problem)

  def half_done(self, *, locked: bool = True) -> int:
    """Starts from a half-done run; returns the killed process's ID."""
    pid = self.job.half_done(self.workdir)
    if not locked:
      (self.workdir / "lock").unlink()
    return pid

  def start(self, *extra: str, **environment: str) -> harness.Process:
    """Starts the command."""
    arguments = [*self.job.arguments, *self.extra, *extra]
    return harness.Process(arguments, self.workdir, **environment)

  def end(self, process: harness.Process) -> harness.Ended:
    """Waits for the end of a process and records it."""
    ended = process.end()
    self.attempts.append(ended.as_json())
    self.messages += ended.lines
    return ended

  def start_until(
    self, condition: Callable[[harness.Process], bool], **environment: str
  ) -> harness.Process:
    """Starts the command and waits for a condition of the process."""
    process = self.start(**environment)
    held = process.wait_until(lambda: condition(process))
    self.expect(held, "a run ended before the fault")
    return process

  def stop_when(
    self,
    condition: Callable[[harness.Process], bool],
    number: int,
    **environment: str,
  ) -> harness.Ended:
    """Starts the command and signals it when the condition holds."""
    process = self.start_until(condition, **environment)
    process.send(number)
    return self.end(process)

  def refuses(
    self, *words: str, error: str | None = None, extra: Sequence[str] = ()
  ) -> None:
    """Runs the command, which must stop with one line that has these words.

    `error` is the line of a run that has ended already; None runs the command.
    """
    if error is None:
      error = self.end(self.start(*extra)).error
    self._done.append("stops with one line")
    self.expect(bool(error), "no error in one line")
    for word in words:
      self.expect(word in error, f"the error does not say {word!r}")

  def refuses_unchanged(self, *words: str, extra: Sequence[str] = ()) -> None:
    """Checks like `refuses`, and that no file of the workdir changes."""
    before = _contents(self.workdir)
    self.refuses(*words, extra=extra)
    self._done.append("changes nothing")
    self.expect(_contents(self.workdir) == before, "files were changed")

  def recovers(
    self, *says: str, identical: bool = True, **environment: str
  ) -> None:
    """Runs the command, which must finish with the reference's results.

    Its messages must contain all of `says`.
    """
    self._done.append("recovers" if identical else "finishes")
    ended = self.end(self.start(**environment))
    self.says(ended, *says)
    self.compare(ended, identical=identical)

  def says(self, ended: harness.Ended, *says: str) -> None:
    """Checks that a process's messages contain these words."""
    text = "".join(ended.lines)
    for words in says:
      self.expect(words in text, f"the run does not say {words!r}")

  def compare(self, ended: harness.Ended, *, identical: bool = True) -> None:
    """Compares the finished run with the reference."""
    self.expect(ended.code == 0, f"the run ended with code {ended.code}")
    if ended.code:
      return
    try:
      run_results = harness.results(self.workdir)
    except errors.WorkdirError as error:
      self.problems.append(str(error))
      return
    count = harness.num_different_bytes(self.job.reference.results, run_results)
    self.different_bytes = (self.different_bytes or 0) + count
    self.expect(not identical or count == 0, "results differ")

  def keeps(self, what: str, holds: bool) -> None:
    """Records that the run keeps `what`; a problem unless it `holds`."""
    self._done.append(f"keeps {what}")
    self.expect(holds, f"does not keep {what}")

  def latest_is_good(self) -> None:
    """Checks that the latest checkpoint can be restored and is finite."""
    try:
      step = int(harness.latest(self.workdir).name)
      arrays = harness.arrays(self.workdir, "latest", step)
    except errors.WorkdirError as error:
      self.problems.append(str(error))
      return
    for name, array in arrays.items():
      has_floats = np.issubdtype(array.dtype, np.floating)
      is_good = not has_floats or bool(np.isfinite(array).all())
      self.expect(is_good, f"{name} of the latest checkpoint is not finite")


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
  """Reads everything in a folder, by relative path."""
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
    for path in folder.rglob("*")
  }


@dataclasses.dataclass
class Row:
  """A row of the table, and whether all its results were expected."""

  fault: str
  injected: int
  outcome: str
  different_bytes: int | None
  note: str
  as_expected: bool

  def __str__(self) -> str:
    different = "–" if self.different_bytes is None else self.different_bytes
    cells = (self.fault, self.injected, self.outcome, different, self.note)
    return markdown.row(cells)
