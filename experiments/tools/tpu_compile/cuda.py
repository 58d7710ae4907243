"""Lowers the steps of an experiment for GPUs, without a GPU.

  python -m experiments.tools.tpu_compile.cuda --config=configs/v1_depth20.py
    [--config.model.depth=110 ...] [--devices=4]
    [--out=experiments/tools/tpu_compile/cuda.jsonl]

XLA's compiler for GPUs needs a GPU. Its input does not: JAX lowers the steps to
StableHLO for the platform `cuda`, as `jax.export` does.
"""

import json
import pathlib
import sys

import jax
from absl import flags

from experiments.tools.tpu_compile import compilation, records
from resnet_flax.run import (
  command_line,
  environment,
  errors,
  process,
  surroundings,
)

_DEVICES = flags.DEFINE_integer("devices", 4, "GPUs that share a batch.")
_OUT = flags.DEFINE_string("out", "", "JSON Lines file for the new record.")


def main(argv: list[str]) -> None:
  """Lowers, prints and records."""
  del argv
  if _DEVICES.value < 1:
    raise errors.ConfigError(f"--devices={_DEVICES.value} must be at least 1.")
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", _DEVICES.value)
  surroundings.set_up()
  config, _ = command_line.config_and_workdir()
  result = {
    "arguments": records.arguments(sys.argv),
    "topology": f"cuda:{_DEVICES.value}",
    "config": compilation.facts(config),
    **compilation.lower(config, jax.devices()),
    "environment": environment.describe([]),
  }
  print(json.dumps(result, indent=2))
  if _OUT.value:
    records.add(pathlib.Path(_OUT.value), result)


if __name__ == "__main__":
  process.run(main, command_line.parse_flags)
