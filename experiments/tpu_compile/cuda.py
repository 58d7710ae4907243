"""Lowers the steps of an experiment for GPUs, on a machine without one.

  python -m experiments.tpu_compile.cuda --config=configs/v1_depth20.py
    [--config.model.depth=110 ...] [--devices=4]
    [--out=experiments/tpu_compile/cuda.json]

XLA's compiler for GPUs needs one. What it is given does not: the StableHLO that
JAX lowers for the platform `cuda`, as `jax.export` does.
"""

import collections
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from jaxlib.mlir import ir
from ml_collections import ConfigDict

from experiments.tpu_compile import compilation, records
from resnet_flax import command_line, environment, errors, program

_DEVICES = flags.DEFINE_integer("devices", 4, "GPUs that share a batch.")
_OUT = flags.DEFINE_string("out", "", "JSON file that the result is added to.")


def describe(
  config: ConfigDict, devices: Sequence[jax.Device]
) -> dict[str, Any]:
  """Lowers both steps for GPUs and says what is in them.

  Args:
    config: every key of `configs/base.py`.
    devices: as many as there would be GPUs; of what kind does not matter.

  Returns:
    For each of `compilation.STEPS` its `convolutions`, `dots` (products of
    matrices) and `loops`, as they stand in the program, and `custom_calls`,
    which are not of StableHLO, by target.

  Raises:
    ConfigError: a value that cannot be used.
  """
  result = {}
  for name, traced in compilation.trace(config, devices).items():
    lowered = traced.lower(lowering_platforms=("cuda",))
    names: collections.Counter[str] = collections.Counter()
    targets: collections.Counter[str] = collections.Counter()

    def visit(operation, names=names, targets=targets):
      names[operation.name] += 1
      if operation.name == "stablehlo.custom_call":
        targets[str(operation.attributes["call_target_name"]).strip('"')] += 1
      return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    result[name] = {
      "convolutions": names["stablehlo.convolution"],
      "dots": names["stablehlo.dot_general"],
      "loops": names["stablehlo.while"],
      "custom_calls": dict(sorted(targets.items())),
    }
  return result


def main(argv: list[str]) -> None:
  """Lowers, prints and records."""
  del argv
  if _DEVICES.value < 1:
    raise errors.ConfigError(
      f"--devices={_DEVICES.value} cannot be used; needed: at least 1."
    )
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", _DEVICES.value)
  command_line.set_up()
  config, _ = command_line.config_and_workdir()
  result = {
    "arguments": records.arguments(sys.argv),
    "topology": f"cuda:{_DEVICES.value}",
    "config": compilation.facts(config),
    **describe(config, jax.devices()),
    "environment": environment.describe([]),
  }
  print(json.dumps(result, indent=2))
  if _OUT.value:
    records.add(pathlib.Path(_OUT.value), result)


if __name__ == "__main__":
  program.run(main)
