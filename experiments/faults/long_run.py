"""Compares a long run that is killed every few minutes with an undisturbed run.

  python -m experiments.faults.long_run --config=configs/v1_depth20.py
    --folder=runs/long_run --minutes=45 --mean_minutes=3

Both train at the same time, each on its own core. The disturbed run gets
SIGTERM or SIGKILL at random times. It is started again with the same command
until it finishes. The folder keeps both workdirs, both logs, and `results.json`
with the signals, the exit codes and the resident memory over time.
"""

import os
import pathlib
import signal
import subprocess
import time
from concurrent import futures
from typing import Any

import numpy as np
from absl import flags

from experiments.faults import harness
from experiments.tools.config_arguments import config_arguments
from resnet_flax.run import (
  command_line,
  environment,
  files as files_lib,
  process,
  surroundings,
)

_FOLDER = flags.DEFINE_string("folder", "runs/long_run", "Folder of both runs.")
_MINUTES = flags.DEFINE_float(
  "minutes", 45.0, "Minutes in which signals are sent; 0 sends none."
)
_MEAN = flags.DEFINE_float("mean_minutes", 3.0, "Mean time between signals.")
_SEED = flags.DEFINE_integer("seed", 0, "Draws the signals and their times.")
_MEMORY_SECONDS = 5.0


class Twin:
  """One of the two runs, which is started again until it finishes.

  `folder` holds its workdir and its log under `name`; it runs on one `core`.
  """

  def __init__(
    self, name: str, folder: pathlib.Path, core: int, arguments: list[str]
  ):
    self.workdir = folder / name
    self._log = folder / f"{name}.log"
    self._core = core
    self._arguments = arguments
    self.starts: list[dict[str, Any]] = []
    # (seconds since the first start, number of the start, MB).
    self.memory: list[tuple[float, int, float]] = []
    self._began = time.monotonic()

  def run(self, rng: np.random.Generator | None) -> None:
    """Runs to the end; `rng` draws signals and times, and None sends none."""
    while True:
      began = time.monotonic()
      wait, number = float("inf"), 0
      if rng is not None and began - self._began < _MINUTES.value * 60:
        # A run needs time to make progress after the last signal.
        wait = 20 + rng.exponential(max(_MEAN.value * 60 - 20, 1.0))
        number = int(rng.choice([signal.SIGTERM, signal.SIGKILL]))
      code, seconds_to_stop = self._run_once(wait, number)
      self.starts.append(
        {
          "seconds": time.monotonic() - began,
          "signal": signal.Signals(number).name if seconds_to_stop else None,
          "seconds_to_stop": seconds_to_stop,
          "exit_code": code,
        }
      )
      if seconds_to_stop is None:
        if code:
          raise RuntimeError(f"{self.workdir} ended with code {code}")
        return

  def _run_once(self, wait: float, number: int) -> tuple[int, float | None]:
    began = time.monotonic()
    sent: float | None = None
    with self._log.open("a") as log:
      process = subprocess.Popen(
        harness.command(self._arguments, self.workdir),
        stdout=log,
        stderr=log,
        preexec_fn=lambda: os.sched_setaffinity(0, {self._core}),
      )
      measured = began
      while process.poll() is None:
        time.sleep(0.05)
        now = time.monotonic()
        if sent is None and now - began >= wait:
          process.send_signal(number)
          sent = now
        if now - measured >= _MEMORY_SECONDS:
          measured = now
          self._measure(process.pid)
    seconds_to_stop = None if sent is None else time.monotonic() - sent
    return process.returncode, seconds_to_stop

  def _measure(self, pid: int) -> None:
    try:
      pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
      return  # The process has just ended.
    seconds = time.monotonic() - self._began
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    self.memory.append((round(seconds, 1), len(self.starts), megabytes))


def main(argv: list[str]) -> None:
  """Runs both twins and compares them."""
  del argv
  surroundings.set_up()
  folder = pathlib.Path(_FOLDER.value)
  folder.mkdir(parents=True)
  arguments = config_arguments()
  cores = sorted(os.sched_getaffinity(0))[:2]
  twins = [
    Twin(name, folder, core, arguments)
    for name, core in zip(("disturbed", "undisturbed"), cores, strict=True)
  ]
  rngs = [np.random.default_rng(_SEED.value), None]
  with futures.ThreadPoolExecutor() as pool:
    list(pool.map(Twin.run, twins, rngs))  # Raises a twin's error.
  results = [harness.results(twin.workdir) for twin in twins]
  different = harness.num_different_bytes(*results)
  files_lib.write_json(
    folder / "results.json",
    {
      "environment": environment.describe([]),
      "arguments": arguments,
      "different_bytes": different,
      "compared_bytes": sum(value.nbytes for value in results[0].values()),
      **{
        twin.workdir.name: {"starts": twin.starts, "memory": twin.memory}
        for twin in twins
      },
    },
  )
  signals = [start["signal"] for start in twins[0].starts if start["signal"]]
  print(f"{len(signals)} signals; {different} bytes of the results differ.")


if __name__ == "__main__":
  process.run(main, command_line.parse_flags)
