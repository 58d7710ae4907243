"""Starts runs, stops them, and compares what they leave."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from resnet_flax import (
  checkpoint,
  experiment as experiment_lib,
  mesh as mesh_lib,
  metrics,
  workdir as workdir_lib,
)

# They differ from run to run, even of the same bits.
_TIMING = ("epoch_seconds", "images_per_second")


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a process ended.

  Attributes:
    code: exit code; negative if a signal killed it.
    lines: what it wrote to standard error.
    seconds: from its start, or from the signal if it was sent one.
    saving: whether a half-written checkpoint was left.
  """

  code: int
  lines: list[str]
  seconds: float
  saving: bool

  @property
  def phase(self) -> str:
    """What the process was doing, as far as its messages tell."""
    if self.saving:
      return "saving"
    text = "".join(self.lines)
    if "compiled in" in text:
      return "training or evaluating"
    if "compiling" in text:
      return "compiling"
    return "starting"


def start(
  arguments: list[str], workdir: pathlib.Path, **environment: str
) -> subprocess.Popen:
  """Starts the main command on a workdir; returns at once."""
  return subprocess.Popen(
    [
      *(sys.executable, "-m", "resnet_flax.main", *arguments),
      f"--workdir={workdir}",
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, **environment},
  )


def run(
  arguments: list[str], workdir: pathlib.Path, **environment: str
) -> Ended:
  """Runs the main command to its end."""
  started = time.monotonic()
  process = start(arguments, workdir, **environment)
  return _end(process, workdir, started)


def run_and_signal(
  arguments: list[str],
  workdir: pathlib.Path,
  number: int,
  after: float | Callable[[], bool],
) -> Ended:
  """Runs the main command and sends it a signal, unless it ends before.

  Args:
    arguments: of the command.
    workdir: of the run.
    number: the signal's.
    after: seconds from the start, or a condition that is polled.
  """
  process = start(arguments, workdir)
  started = time.monotonic()
  while process.poll() is None:
    now = time.monotonic()
    if after() if callable(after) else now - started >= after:
      process.send_signal(number)
      started = now
      break
    time.sleep(0.005)
  return _end(process, workdir, started)


def _end(
  process: subprocess.Popen, workdir: pathlib.Path, started: float
) -> Ended:
  _, text = process.communicate()
  seconds = time.monotonic() - started
  saving = any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
  return Ended(
    process.returncode, text.splitlines(keepends=True), seconds, saving
  )


def results(workdir: pathlib.Path) -> dict[str, Any]:
  """What a finished run is for: its records and its two checkpoints.

  Returns:
    `records`, without what is timed, as JSON; and the arrays of the latest and
    of the best checkpoint, by path.
  """
  config = workdir_lib.load_config(workdir)
  experiment = experiment_lib.build(config)
  like = experiment_lib.abstract_state(config, experiment)
  records = metrics.MetricsLog(workdir).read()
  best = metrics.best_record(records, config.checkpoint.monitor)["step"]
  untimed = [
    {key: value for key, value in record.items() if key not in _TIMING}
    for record in records
  ]
  found: dict[str, Any] = {"records": np.bytes_(json.dumps(untimed))}
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    for name, step in (("latest", checkpoints.steps()[-1]), ("best", best)):
      state, _ = checkpoints.restore(step, like, mesh_lib.create_mesh())
      for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        found[f"{name}/{key}"] = np.asarray(leaf)
  return found


def num_different_bytes(one: dict[str, Any], other: dict[str, Any]) -> int:
  """How many bytes of two runs' results differ; all, where one is missing."""
  count = 0
  for name in one.keys() | other.keys():
    a, b = (
      side[name].tobytes() if name in side else b"" for side in (one, other)
    )
    count += abs(len(a) - len(b))
    count += sum(x != y for x, y in zip(a, b, strict=False)) if a != b else 0
  return count
