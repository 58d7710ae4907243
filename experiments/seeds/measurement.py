"""Measures several seeds in one program and one program after another."""

import functools
import operator
import subprocess
import sys
import tempfile
from typing import Any

from ml_collections import ConfigDict

from experiments.tools import markdown, timing

ALONE, IN_TURN, VECTORIZED = "one after another", "in turn", "vectorized"


def measure_steps(
  config: ConfigDict, rounds: int, steps: int
) -> dict[str, list[float]]:
  """Images/s of all seeds together, by round, for each kind of execution."""
  seed_configs = [
    ConfigDict(config.to_dict() | {"seed": seed, "num_seeds": 1})
    for seed in range(config.seed, config.seed + config.num_seeds)
  ]
  trainers = {
    ALONE: [timing.prepare(seed_config) for seed_config in seed_configs],
    IN_TURN: [timing.prepare(config, execution="in_turn")],
    VECTORIZED: [timing.prepare(config, execution="vectorized")],
  }

  def train(name: str) -> None:
    for trainer in trainers[name]:
      trainer.train(steps)

  windows = {name: functools.partial(train, name) for name in trainers}
  images = steps * config.batch_size * config.num_seeds
  return {
    name: [images / seconds for seconds in by_round]
    for name, by_round in timing.in_turn(windows, rounds).items()
  }


def measure_runs(
  arguments: list[str], config: ConfigDict, rounds: int
) -> dict[str, list[float]]:
  """Seconds of one command for all seeds, and of one command per seed.

  `arguments` are --config and its overrides, which give `config`.
  """
  main = [sys.executable, "-m", "resnet_flax.main", *arguments]
  seeds = range(config.seed, config.seed + config.num_seeds)
  each_alone = [["--config.num_seeds=1", f"--config.seed={k}"] for k in seeds]

  def run(all_overrides: list[list[str]]) -> None:
    for overrides in all_overrides:
      with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
          [*main, *overrides, f"--workdir={folder}/run"],
          check=True,
          capture_output=True,
        )

  commands = {
    "one program": functools.partial(run, [[]]),
    "a program for each": functools.partial(run, each_alone),
  }
  return timing.in_turn(commands, rounds)


def table(results: dict[str, Any]) -> str:
  """Formats the results of `measure_steps` and `measure_runs` as Markdown.

  They are `steps` and `runs` of `results`; `runs` may be empty.
  """

  def ratios(measured: dict[str, list[float]], one: str, other: str):
    return list(map(operator.truediv, measured[one], measured[other]))

  steps, runs = results["steps"], results["runs"]
  rows = [(f"{name}, images/s", steps[name], ".1f") for name in steps]
  rows += [
    (f"{name} / {ALONE}", ratios(steps, name, ALONE), ".3f")
    for name in (IN_TURN, VECTORIZED)
  ]
  if runs:
    together, apart = runs
    rows += [(f"{name}, s", runs[name], ".1f") for name in runs]
    rows += [(f"{apart} / {together}", ratios(runs, apart, together), ".3f")]
  return markdown.spread_table(rows)
