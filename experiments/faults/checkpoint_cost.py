"""Measures the cost of a checkpoint, and the share of an epoch for saving.

  python -m experiments.faults.checkpoint_cost --config=configs/v1_depth20.py
    [--rounds=10] [--steps=40] [--out=FILE.json]

Two measurements on the real data take turns: steps without a checkpoint, and
steps during a save, until the checkpoint is on disk. Nothing else should run.
"""

import pathlib
import statistics
import tempfile
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments.tools import raw_file, timing
from resnet_flax.run import (
  checkpoint,
  command_line,
  environment,
  experiment as experiment_lib,
  huge_pages,
  process,
  surroundings,
)

_ROUNDS = flags.DEFINE_integer(
  "rounds", 10, "Rounds, after a warm-up round.", lower_bound=1
)
_STEPS = flags.DEFINE_integer(
  "steps", 40, "Training steps per measurement.", lower_bound=1
)
flags.adopt_module_key_flags(raw_file)


def measure(config: ConfigDict, rounds: int, steps: int) -> dict[str, Any]:
  """Seconds of training steps without and with a checkpoint, by round."""
  trainer = timing.prepare(config)
  with (
    tempfile.TemporaryDirectory() as folder,
    checkpoint.Checkpoints(pathlib.Path(folder)) as checkpoints,
  ):

    def save_and_train() -> None:
      (state,) = trainer.layout.get(trainer.state)
      checkpoints.save(state, {"epoch_seconds": 0.0})
      trainer.train(steps)
      checkpoints.wait()

    seconds = timing.in_turn(
      {"without": lambda: trainer.train(steps), "with": save_and_train}, rounds
    )
  steps_per_epoch = experiment_lib.build(config).learning_rate.steps_per_epoch
  return {**seconds, "steps": steps, "steps_per_epoch": steps_per_epoch}


def _summary(config: ConfigDict, results: dict[str, Any]) -> str:
  pairs = zip(results["with"], results["without"], strict=True)
  extra = sorted(a - b for a, b in pairs)
  step = statistics.median(results["without"]) / results["steps"]
  epoch = step * results["steps_per_epoch"]
  interval = config.checkpoint.every_minutes * 60
  saves = 1 + (int(epoch / interval) if interval else 0)
  cost = statistics.median(extra)
  return (
    f"a checkpoint costs {cost:.3f} s ({extra[0]:.3f} to {extra[-1]:.3f}); at"
    f" {saves} in an epoch of {epoch:.0f} s that is"
    f" {saves * cost / epoch:.2%} ({saves * extra[0] / epoch:.2%} to"
    f" {saves * extra[-1] / epoch:.2%})"
  )


def main(argv: list[str]) -> None:
  """Measures, prints a line and writes the raw figures."""
  del argv
  surroundings.set_up()
  config, _ = command_line.config_and_workdir()
  results = {
    "environment": environment.describe(jax.devices()),
    **measure(config, _ROUNDS.value, _STEPS.value),
  }
  print(_summary(config, results))
  raw_file.write(results)


if __name__ == "__main__":
  huge_pages.use()
  process.run(main, command_line.parse_flags)
