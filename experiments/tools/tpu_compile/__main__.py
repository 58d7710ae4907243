"""Compiles the steps of an experiment for TPUs, without a TPU.

  python -m experiments.tpu_compile --config=configs/v1_depth20.py
    [--config.model.depth=110 ...] --topology=v5e:2x4
    [--out=experiments/tools/tpu_compile/results.jsonl]

The command prints the result as JSON. The TPU compiler, libtpu, comes with the
extra `tpu-aot` and takes minutes for a step. With --out the result is added to
a file of records and replaces a record of the same arguments and topology.
`python -m experiments.tools.tpu_compile.table` writes tables from the file.
"""

import importlib.metadata
import json
import os
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

_TOPOLOGY = flags.DEFINE_string(
  "topology", "", "Generation and chips in each direction, such as v5e:2x4."
)
_OUT = flags.DEFINE_string("out", "", "JSON Lines file for the new record.")


def main(argv: list[str]) -> None:
  """Compiles, prints and records."""
  del argv
  # The program needs neither a TPU nor Google's metadata server.
  jax.config.update("jax_platforms", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  # Without a TPU, several processes may load libtpu.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  surroundings.set_up()
  config, _ = command_line.config_and_workdir()
  if not _TOPOLOGY.value:
    raise errors.ConfigError("--topology must be set, for example to v5e:2x4.")
  out = pathlib.Path(_OUT.value) if _OUT.value else None
  if out:
    # An unusable file must end the program before minutes of compilation.
    records.read(out)
    if not out.parent.is_dir():
      raise errors.DataError(f"--out={out}: make the folder {out.parent}.")
  # With a cache, the times would not include compilation.
  jax.config.update("jax_enable_compilation_cache", False)
  devices = compilation.topology_devices(_TOPOLOGY.value)
  described = environment.describe(devices)
  described["libraries"]["libtpu"] = importlib.metadata.version("libtpu")
  result = {
    "arguments": records.arguments(sys.argv),
    **compilation.describe(
      config, _TOPOLOGY.value, devices, devices[0].num_cores
    ),
    "environment": described,
  }
  print(json.dumps(result, indent=2))
  if out:
    records.add(out, result)
  compilation.check_transfers(result)


if __name__ == "__main__":
  process.run(main, command_line.parse_flags)
