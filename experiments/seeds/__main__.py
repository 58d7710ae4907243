"""Measures several seeds in one program against one after another.

  python -m experiments.seeds --config=configs/v1_depth20.py
    --config.model.depth=8 --config.num_seeds=3 [--rounds=5] [--steps=60]
    [--runs=3 --config.num_epochs=1] [--out=results.json]

Everything is measured in one run, in turn, several rounds: training steps of
all seeds one after another, in turn and vectorised; then, with --runs, the
whole command, once with all seeds and once for each of them. Nothing else
should run meanwhile.
"""

import itertools
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict

from experiments.throughput.in_turn import in_turn
from resnet_flax import (
  command_line,
  config_rules,
  datasets,
  environment,
  errors,
  experiment as experiment_lib,
  huge_pages,
  seeds,
  train,
  workdir,
)

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of steps.")
_STEPS = flags.DEFINE_integer("steps", 60, "Training steps of a round.")
_RUNS = flags.DEFINE_integer("runs", 0, "Rounds of the whole command.")
_OUT = flags.DEFINE_string("out", "", "JSON file for the raw figures.")

ALONE, IN_TURN, VECTORIZED = "one after another", "in turn", "vectorized"


class Trainer:
  """Takes training steps of the seeds of a layout on the real data.

  Args:
    config: the experiment's.
    split: what is trained on.
    layout: the seeds and where they are.
    compiled: a step that was compiled for a layout like it.
  """

  def __init__(
    self,
    config: ConfigDict,
    split: datasets.Split,
    layout: seeds.Layout,
    compiled: train.CompiledStep | None = None,
  ):
    experiment = experiment_lib.build(config)
    size = config.batch_size
    self._layout = layout
    self._state = train.initial_state(config, experiment, split, layout)
    self._key = train.augmentation_key(layout)
    self.compiled = compiled or train.compile_train_step(
      experiment, self._state, size, self._key, layout
    )
    self._batches = itertools.chain.from_iterable(
      train.epoch_batches(split, size, epoch, layout)
      for epoch in itertools.count()
    )

  def take(self, steps: int) -> None:
    """Takes so many steps."""
    self._state, _ = train.train_steps(
      self.compiled,
      self._state,
      itertools.islice(self._batches, steps),
      self._key,
      lambda _: None,
      layout=self._layout,
    )


def measure_steps(
  config: ConfigDict, rounds: int, steps: int
) -> dict[str, list[float]]:
  """Images/s of all seeds together, in each way, on all devices.

  Args:
    config: the experiment, of several seeds.
    rounds: how often each is measured.
    steps: training steps of each seed in one measurement.
  """
  split = datasets.load(config.dataset).train
  together = {
    name: [Trainer(config, split, seeds.Layout.create(config, None, execution))]
    for name, execution in ((IN_TURN, "in_turn"), (VECTORIZED, "vectorized"))
  }
  alone: list[Trainer] = []
  for seed in range(config.seed, config.seed + config.num_seeds):
    of_one = ConfigDict(config.to_dict() | {"seed": seed, "num_seeds": 1})
    layout = seeds.Layout.create(of_one)
    compiled = alone[0].compiled if alone else None
    alone.append(Trainer(of_one, split, layout, compiled))
  ways = {ALONE: alone} | together
  images = steps * config.batch_size * config.num_seeds
  speeds: dict[str, list[float]] = {name: [] for name in ways}
  for round_number, name in in_turn(ways, rounds):
    started = time.perf_counter()
    for trainer in ways[name]:
      trainer.take(steps)
    if round_number:
      speeds[name].append(images / (time.perf_counter() - started))
  return speeds


def measure_runs(
  arguments: list[str], config: ConfigDict, rounds: int
) -> dict[str, list[float]]:
  """Seconds of the whole command for all seeds, and once for each.

  Args:
    arguments: the command's --config and its overrides.
    config: what they stand for.
    rounds: how often each is measured, after a round to warm up.
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


def _table(results: dict[str, Any]) -> str:
  def row(name: str, values: list[float], form: str) -> str:
    numbers = (statistics.median(values), min(values), max(values))
    return f"| {name} | " + " | ".join(format(x, form) for x in numbers) + " |"

  def ratio(measured: dict[str, list[float]], one: str, other: str):
    pairs = zip(measured[one], measured[other], strict=True)
    return [a / b for a, b in pairs]

  steps, runs = results["steps"], results["runs"]
  lines = [
    "| measurement | median | least | most |",
    "| --- | --- | --- | --- |",
    *(row(f"{name}, images/s", steps[name], ".1f") for name in steps),
    *(
      row(f"{name} / {ALONE}", ratio(steps, name, ALONE), ".3f")
      for name in (IN_TURN, VECTORIZED)
    ),
  ]
  if runs:
    together, each = runs
    lines += [row(f"{name}, s", runs[name], ".1f") for name in runs]
    lines += [row(f"{each} / {together}", ratio(runs, each, together), ".3f")]
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  """Measures, prints a table and writes the raw figures."""
  del argv
  command_line.set_up()
  config, _ = command_line.config_and_workdir()
  config_rules.check(config, num_devices=jax.device_count())
  if config.num_seeds < 2:
    raise errors.ConfigError("num_seeds=1 cannot be used; needed: at least 2.")
  arguments = [each for each in sys.argv[1:] if each.startswith("--config")]
  results = {
    "arguments": arguments,
    "environment": environment.describe(jax.devices()),
    "steps": measure_steps(config, _ROUNDS.value, _STEPS.value),
    "runs": {},
  }
  if _RUNS.value:
    results["runs"] = measure_runs(arguments, config, _RUNS.value)
  print(_table(results))
  if _OUT.value:
    workdir.write_json(pathlib.Path(_OUT.value), results)


if __name__ == "__main__":
  huge_pages.use_huge_pages()
  app.run(main, flags_parser=command_line.parse_flags)
