"""Measures the input pipeline and the start of a run.

  python -m experiments.throughput.input_pipeline --config=configs/v1_depth20.py
    [--rounds=5] [--steps=60] [--out=results.json] [--config.batch_size=128]

One run measures all settings in turn, for several rounds. It compares training
on the real data with the same compiled step on one resident batch. Then it
times a command up to its first step, with an empty and with a filled
compilation cache. The cache keeps no program with oneDNN's convolution
(models/kernels/onednn.py). Nothing else should run meanwhile.
"""

import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict

from experiments.throughput import report
from experiments.tools.timing import in_turn, prepare_on_data
from resnet_flax.run import (
  command_line,
  environment,
  files as files_lib,
  huge_pages,
  surroundings,
)

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of each measurement.")
_STEPS = flags.DEFINE_integer("steps", 60, "Training steps per round.")
_OUT = flags.DEFINE_string("out", "", "JSON file for the raw figures.")


def measure_steps(
  config: ConfigDict, rounds: int, steps: int
) -> dict[str, list[float]]:
  """Measures images/s of training on real data and on one batch, in turn.

  Args:
    config: the experiment.
    rounds: measurements of each, after a warm-up round.
    steps: training steps of one measurement.

  Returns:
    Images/s of each round: `real` (the data set) and `resident` (the same
    compiled step on one batch that stays on the devices).
  """
  resident, batches_from = prepare_on_data(config)
  sources = {
    "real": lambda epoch: itertools.islice(batches_from(epoch), steps),
    "resident": lambda _: itertools.repeat(resident.batch, steps),
  }
  speeds: dict[str, list[float]] = {name: [] for name in sources}
  for round_number, name in in_turn(sources, rounds):
    started = time.perf_counter()
    resident.train(sources[name](round_number))
    seconds = time.perf_counter() - started
    if round_number:
      speeds[name].append(steps * config.batch_size / seconds)
  return speeds


def measure_start(arguments: list[str], rounds: int) -> dict[str, Any]:
  """Times a command up to compilation and up to its first step.

  Args:
    arguments: arguments of `resnet_flax.main`.
    rounds: starts with a filled cache, after one start with an empty cache.

  Returns:
    For `cold` and `warm` a list of {'compiling': s, 'first_step': s}.
  """
  with tempfile.TemporaryDirectory() as cache:
    times = [_start(arguments, cache) for _ in range(rounds + 1)]
  return {"cold": times[:1], "warm": times[1:]}


def _start(arguments: list[str], cache: str) -> dict[str, float]:
  with tempfile.TemporaryDirectory() as workdir:
    started = time.perf_counter()
    process = subprocess.Popen(
      [
        *(sys.executable, "-m", "resnet_flax.main", *arguments),
        "--config.log.interval_seconds=0",
        f"--workdir={workdir}",
      ],
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache},
    )
    assert process.stderr is not None
    times, lines = {}, []
    for line in process.stderr:
      lines.append(line)
      if line.startswith("compiling"):
        times["compiling"] = time.perf_counter() - started
      if " step 1/" in line:
        times["first_step"] = time.perf_counter() - started
        break
    process.kill()
    process.wait()
    process.stderr.close()
  if "first_step" not in times:
    raise RuntimeError("the run did not start:\n" + "".join(lines))
  return times


def main(argv: list[str]) -> None:
  """Measures, prints a table and writes the raw figures."""
  del argv
  surroundings.set_up()
  config, _ = command_line.config_and_workdir()
  arguments = [
    argument
    for argument in sys.argv[1:]
    if not argument.startswith(("--rounds", "--steps", "--out"))
  ]
  results = {
    "arguments": arguments,
    "environment": environment.describe(jax.devices()),
    "steps": measure_steps(config, _ROUNDS.value, _STEPS.value),
    "start": measure_start(arguments, _ROUNDS.value),
  }
  print(report.pipeline_table(results))
  if _OUT.value:
    files_lib.write_json(pathlib.Path(_OUT.value), results)


if __name__ == "__main__":
  huge_pages.use()
  app.run(main, flags_parser=command_line.parse_flags)
