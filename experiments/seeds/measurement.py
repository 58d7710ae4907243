"""Measures several seeds in one program and one program after another."""

import itertools
import subprocess
import sys
import tempfile
import time
from typing import Any

from ml_collections import ConfigDict

from experiments.tools import markdown
from experiments.tools.timing import in_turn, prepare_on_data

ALONE, IN_TURN, VECTORIZED = "one after another", "in turn", "vectorized"


def measure_steps(
  config: ConfigDict, rounds: int, steps: int
) -> dict[str, list[float]]:
  """Measures images/s of all seeds together, for each kind of execution.

  Args:
    config: the experiment, with several seeds.
    rounds: measurements of each kind, after a warm-up round.
    steps: training steps of each seed in one measurement.
  """
  of_each = [
    ConfigDict(config.to_dict() | {"seed": seed, "num_seeds": 1})
    for seed in range(config.seed, config.seed + config.num_seeds)
  ]
  prepared = {
    ALONE: [prepare_on_data(of_one) for of_one in of_each],
    IN_TURN: [prepare_on_data(config, "in_turn")],
    VECTORIZED: [prepare_on_data(config, "vectorized")],
  }
  ways = {
    name: [(resident, batches_from(0)) for resident, batches_from in each]
    for name, each in prepared.items()
  }
  images = steps * config.batch_size * config.num_seeds
  speeds: dict[str, list[float]] = {name: [] for name in ways}
  for round_number, name in in_turn(ways, rounds):
    started = time.perf_counter()
    for resident, batches in ways[name]:
      resident.train(itertools.islice(batches, steps))
    if round_number:
      speeds[name].append(images / (time.perf_counter() - started))
  return speeds


def measure_runs(
  arguments: list[str], config: ConfigDict, rounds: int
) -> dict[str, list[float]]:
  """Times one command for all seeds against one command for each seed.

  Args:
    arguments: the command's --config and its overrides.
    config: the configuration that these arguments give.
    rounds: measurements of each, after a warm-up round.
  """
  last = config.seed + config.num_seeds
  commands: dict[str, list[list[str]]] = {
    "one program": [[]],
    "a program for each": [
      ["--config.num_seeds=1", f"--config.seed={seed}"]
      for seed in range(config.seed, last)
    ],
  }
  seconds: dict[str, list[float]] = {name: [] for name in commands}
  for round_number, name in in_turn(commands, rounds):
    started = time.perf_counter()
    for overrides in commands[name]:
      with tempfile.TemporaryDirectory() as folder:
        main = [sys.executable, "-m", "resnet_flax.main", *arguments]
        subprocess.run(
          [*main, *overrides, f"--workdir={folder}/run"],
          check=True,
          capture_output=True,
        )
    if round_number:
      seconds[name].append(time.perf_counter() - started)
  return seconds


def table(results: dict[str, Any]) -> str:
  """Formats results as Markdown.

  Args:
    results: `steps` from `measure_steps`; `runs` from `measure_runs`, or {}.
  """

  def ratios(measured: dict[str, list[float]], one: str, other: str):
    pairs = zip(measured[one], measured[other], strict=True)
    return [a / b for a, b in pairs]

  steps, runs = results["steps"], results["runs"]
  rows = [(f"{name}, images/s", steps[name], ".1f") for name in steps]
  rows += [
    (f"{name} / {ALONE}", ratios(steps, name, ALONE), ".3f")
    for name in (IN_TURN, VECTORIZED)
  ]
  if runs:
    together, each = runs
    rows += [(f"{name}, s", runs[name], ".1f") for name in runs]
    rows += [(f"{each} / {together}", ratios(runs, each, together), ".3f")]
  return markdown.spread_table(rows)
