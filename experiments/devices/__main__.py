"""Measures training on 1, 2, 4 and 8 virtual devices of one CPU.

  python -m experiments.devices --config=configs/v1_depth20.py
    [--devices=1,2,4,8] [--per_device=32] [--rounds=5] [--steps=8]
    [--out=results.json]

Virtual devices are threads of one CPU. They show whether results depend on the
number of devices and how much sharding costs. They cannot show its gain.
Nothing else should run meanwhile.
"""

import sys

import jax
from absl import flags

from experiments.devices import measurement
from experiments.tools import raw_file
from resnet_flax.run import (
  command_line,
  environment,
  huge_pages,
  process,
  surroundings,
)

_DEVICES = flags.DEFINE_list("devices", "1,2,4,8", "Device counts to measure.")
_PER_DEVICE = flags.DEFINE_integer(
  "per_device", 32, "Images for each device.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer(
  "rounds", 5, "Measurements of each setting.", lower_bound=1
)
_STEPS = flags.DEFINE_integer(
  "steps", 8, "Training steps per round.", lower_bound=1
)
flags.adopt_module_key_flags(raw_file)
flags.register_validator(
  "devices",
  lambda numbers: numbers and all(n.isdecimal() and int(n) for n in numbers),
  "must be integers of at least 1, for example 1,2,4,8.",
)


def main(argv: list[str]) -> None:
  """Measures, prints a table and writes the raw figures."""
  del argv
  numbers = sorted({1, *map(int, _DEVICES.value)})  # Ratios need one device.
  # JAX reads these settings when the first device is requested.
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", numbers[-1])
  surroundings.set_up()
  config, _ = command_line.config_and_workdir()
  measured = measurement.measure(
    config, numbers, _PER_DEVICE.value, _ROUNDS.value, _STEPS.value
  )
  print(measurement.table(measured))
  raw_file.write(
    {
      "arguments": [a for a in sys.argv[1:] if not a.startswith("--out")],
      "environment": environment.describe(jax.devices()),
      "measured": measured,
    }
  )


if __name__ == "__main__":
  huge_pages.use()
  process.run(main, command_line.parse_flags)
