"""Measures how long a run takes from its command to its first step.

  python -m experiments.throughput.start --config=configs/v1_depth20.py
    [--rounds=5] [--out=results.json] [--config.batch_size=128]

The command is started with an empty and with a filled compilation cache. The
cache keeps no program with oneDNN's convolution (models/kernels/onednn.py).
Nothing else should run meanwhile.
"""

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
from absl import flags

from experiments.throughput import report
from experiments.tools import raw_file
from experiments.tools.config_arguments import config_arguments
from resnet_flax import data
from resnet_flax.run import (
  command_line,
  environment,
  huge_pages,
  process,
  surroundings,
)

_ROUNDS = flags.DEFINE_integer(
  "rounds", 5, "Runs with a filled cache.", lower_bound=1
)
flags.adopt_module_key_flags(raw_file)


def _start(arguments: list[str], cache: str) -> dict[str, float]:
  """Seconds up to the start of 'compiling' and up to the 'first_step'."""
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
  data.load(config.dataset)  # Decodes the images, if they are not cached.
  arguments = config_arguments()
  with tempfile.TemporaryDirectory() as cache:
    times = [_start(arguments, cache) for _ in range(_ROUNDS.value + 1)]
  results: dict[str, Any] = {
    "arguments": arguments,
    "environment": environment.describe(jax.devices()),
    "start": {"cold": times[:1], "warm": times[1:]},
  }
  print(report.start_table(results["start"]))
  raw_file.write(results)


if __name__ == "__main__":
  huge_pages.use()
  process.run(main, command_line.parse_flags)
