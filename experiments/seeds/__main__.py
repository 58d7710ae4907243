"""Compares several seeds in one program with one program after another.

  python -m experiments.seeds --config=configs/v1_depth20.py
    --config.model.depth=8 --config.num_seeds=3 [--rounds=5] [--steps=60]
    [--runs=3 --config.num_epochs=1] [--out=results.json]

All settings take turns, for several rounds. First come training steps of all
seeds, executed one after another, in turn and vectorized. With --runs, whole
commands follow: one command with all seeds, and one command per seed. Nothing
else should run meanwhile.
"""

import jax
from absl import flags

from experiments.seeds import measurement
from experiments.tools import raw_file
from experiments.tools.config_arguments import config_arguments
from resnet_flax.run import (
  command_line,
  environment,
  errors,
  huge_pages,
  process,
  rules,
  surroundings,
)

_ROUNDS = flags.DEFINE_integer(
  "rounds", 5, "Rounds of training steps.", lower_bound=1
)
_STEPS = flags.DEFINE_integer(
  "steps", 60, "Training steps per round.", lower_bound=1
)
_RUNS = flags.DEFINE_integer("runs", 0, "Rounds of the whole command.")
flags.adopt_module_key_flags(raw_file)


def main(argv: list[str]) -> None:
  """Measures, prints a table and writes the raw figures."""
  del argv
  surroundings.set_up()
  config, _ = command_line.config_and_workdir()
  rules.check(config, num_devices=jax.device_count())
  if config.num_seeds < 2:
    raise errors.ConfigError("num_seeds=1 must be at least 2, for example 3.")
  arguments = config_arguments()
  results = {
    "arguments": arguments,
    "environment": environment.describe(jax.devices()),
    "steps": measurement.measure_steps(config, _ROUNDS.value, _STEPS.value),
    "runs": {},
  }
  if _RUNS.value:
    results["runs"] = measurement.measure_runs(arguments, config, _RUNS.value)
  print(measurement.table(results))
  raw_file.write(results)


if __name__ == "__main__":
  huge_pages.use()
  process.run(main, command_line.parse_flags)
