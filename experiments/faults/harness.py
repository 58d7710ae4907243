"""Starts runs, stops them, and compares their results."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from resnet_flax.run import (
  checkpoint,
  experiment as experiment_lib,
  folder as workdir_lib,
  metrics,
)

_UNFINISHED = ".orbax-checkpoint-tmp"
_POLL_SECONDS = 0.005


def command(arguments: list[str], workdir: pathlib.Path) -> list[str]:
  """Builds the main command on a workdir, for `subprocess`."""
  main = (sys.executable, "-m", "resnet_flax.main")
  return [*main, *arguments, f"--workdir={workdir}"]


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a process ended."""

  code: int  # Negative if a signal killed it.
  lines: list[str]  # Its standard error.
  seconds: float  # Since its start, or since the signal if it got one.
  signal: str | None = None  # Its name; None if it got none in time.
  phase: str | None = None  # `Process.phase` when it got the signal.
  sent_after: float | None = None  # Seconds from the start to the signal.

  @property
  def error(self) -> str:
    """The last line, 'error: ...', that says why it stopped.

    It is empty if there is none: after exit code 0, a kill or a traceback.
    """
    last = self.lines[-1].strip() if self.lines else ""
    traced = any(line.startswith("Traceback") for line in self.lines)
    is_error = self.code > 0 and last.startswith("error: ") and not traced
    return last if is_error else ""

  def as_json(self) -> dict[str, Any]:
    """Everything except its messages, in JSON's types."""
    return {
      "signal": self.signal,
      "phase": self.phase,
      "signal_after_seconds": self.sent_after,
      "seconds_to_stop" if self.signal else "seconds": self.seconds,
      "exit_code": self.code,
      "error": self.error,
    }


class Process:
  """A running main command on a workdir, with more environment variables."""

  def __init__(
    self, arguments: list[str], workdir: pathlib.Path, **environment: str
  ):
    self._workdir = workdir
    self._steps_per_epoch = 0
    # A file can be read while the process writes, unlike a pipe.
    self._messages, name = tempfile.mkstemp()
    os.unlink(name)
    self._process = subprocess.Popen(
      command(arguments, workdir),
      stdout=subprocess.DEVNULL,
      stderr=self._messages,
      env={**os.environ, **environment},
    )
    self.started = time.monotonic()
    self._sent: tuple[str, str, float] | None = None

  @property
  def pid(self) -> int:
    """The process ID."""
    return self._process.pid

  @property
  def age(self) -> float:
    """Seconds since its start."""
    return time.monotonic() - self.started

  def messages(self) -> str:
    """Its standard error so far."""
    # The process shares the file's position, so reading must not move it.
    content = os.pread(self._messages, os.fstat(self._messages).st_size, 0)
    return content.decode(errors="replace")

  def wait_until(self, condition: Callable[[], bool]) -> bool:
    """Polls until the condition holds; False if the process ends before."""
    while self._process.poll() is None:
      if condition():
        return True
      time.sleep(_POLL_SECONDS)
    return False

  def wait_until_age(self, seconds: float) -> None:
    """Waits until it has this age, or ends before."""
    self.wait_until(lambda: self.age >= seconds)

  def is_compiled(self) -> bool:
    """Whether the training step is compiled."""
    return "compiled in" in self.messages()

  def has_saved(self, step: int = 1) -> bool:
    """Whether there is a complete checkpoint of this step or a later one."""
    return max(checkpoint.steps(self._workdir), default=0) >= step

  def is_saving(self) -> bool:
    """Whether a checkpoint is half written."""
    return any((self._workdir / "checkpoints").glob(f"*{_UNFINISHED}*"))

  def phase(self) -> str:
    """Tells from its messages and its workdir what it is doing.

    'starting': Python and the libraries load. 'preparing': the workdir is
    locked, and the run restores a checkpoint and loads data. 'compiling': the
    training step compiles. Then 'training' or 'evaluating', with '+ saving'
    while a checkpoint is half written.
    """
    if not self.is_compiled():
      if "compiling the" in self.messages():
        return "compiling"
      return "preparing" if self._has_lock() else "starting"
    doing = "evaluating" if self._is_evaluating() else "training"
    return f"{doing} + saving" if self.is_saving() else doing

  def send(self, number: int) -> None:
    """Sends a signal; only the first one is recorded."""
    now, phase = time.monotonic(), self.phase()
    if self._process.poll() is not None:
      return
    self._process.send_signal(number)
    if self._sent is None:
      self._sent = (signal.Signals(number).name, phase, now)

  def end(self) -> Ended:
    """Waits until it ends."""
    code = self._process.wait()
    now = time.monotonic()
    lines = self.messages().splitlines(keepends=True)
    os.close(self._messages)
    if self._sent is None:
      return Ended(code, lines, now - self.started)
    name, phase, sent = self._sent
    return Ended(code, lines, now - sent, name, phase, sent - self.started)

  def _has_lock(self) -> bool:
    try:
      owner = json.loads((self._workdir / "lock").read_text())
    except (OSError, ValueError):
      return False  # There is no lock, or it is being written.
    return owner["pid"] == self.pid

  def _is_evaluating(self) -> bool:
    if not self._steps_per_epoch:
      config = workdir_lib.load_config(self._workdir)
      rate = experiment_lib.build(config).learning_rate
      self._steps_per_epoch = rate.steps_per_epoch
    epochs, within = divmod(_newest(self._workdir), self._steps_per_epoch)
    records = metrics.MetricsLog(self._workdir).read()
    # Training ends an epoch with a checkpoint, evaluation with a record.
    return not within and len(records) < epochs


def best(workdir: pathlib.Path) -> tuple[int, list[float]]:
  """A finished run's oldest saved step, and every epoch's monitored metric.

  The oldest checkpoint is restored, which raises an error if it is damaged.
  """
  monitor = workdir_lib.load_config(workdir).checkpoint.monitor
  records = metrics.MetricsLog(workdir).read()
  step = checkpoint.steps(workdir)[0]
  arrays(workdir, "best", step)
  name = metrics.monitored(records[0], monitor)
  return step, [record[name] for record in records]


def results(workdir: pathlib.Path) -> dict[str, Any]:
  """A finished run's results, by name.

  `records` is JSON, without timing. `latest/PATH` and `best/PATH` are arrays of
  these checkpoints.
  """
  config = workdir_lib.load_config(workdir)
  records = metrics.MetricsLog(workdir).read()
  best = metrics.best_record(records, config.checkpoint.monitor)["step"]
  untimed = [
    {key: value for key, value in record.items() if key not in metrics.TIMED}
    for record in records
  ]
  return {
    "records": np.bytes_(json.dumps(untimed)),
    **arrays(workdir, "latest", checkpoint.steps(workdir)[-1]),
    **arrays(workdir, "best", best),
  }


def latest(workdir: pathlib.Path) -> pathlib.Path:
  """The folder of the latest complete checkpoint."""
  return workdir / "checkpoints" / str(checkpoint.steps(workdir)[-1])


def num_different_bytes(one: dict[str, Any], other: dict[str, Any]) -> int:
  """Counts differing bytes of two runs; a missing array differs in all."""
  count = 0
  for name in one.keys() | other.keys():
    a, b = (
      side[name].tobytes() if name in side else b"" for side in (one, other)
    )
    count += abs(len(a) - len(b))
    count += sum(x != y for x, y in zip(a, b, strict=False)) if a != b else 0
  return count


def arrays(
  workdir: pathlib.Path, name: str, step: int
) -> dict[str, np.ndarray]:
  """Reads the arrays of a checkpoint, by `name`/path."""
  config = workdir_lib.load_config(workdir)
  like = experiment_lib.abstract_state(config, experiment_lib.build(config))
  state, _ = checkpoint.restore(workdir, step, like)
  return {
    f"{name}/{path}": np.asarray(leaf)
    for path, leaf in checkpoint.named_arrays(state).items()
  }


def _newest(workdir: pathlib.Path) -> int:
  """The newest saved or half-saved step; 0 if there is none."""
  names = [path.name for path in (workdir / "checkpoints").glob("*")]
  steps = [name.partition(_UNFINISHED)[0] for name in names]
  return max((int(step) for step in steps if step.isdecimal()), default=0)
