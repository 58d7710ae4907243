"""Published figures of TPU chips, and a step's time by the roofline model.

The model takes the longer of two times: the arithmetic at its peak rate, and
the memory traffic at its peak rate (Williams et al. 2009). A real step is
slower.
"""

import re
from typing import Any, NamedTuple

from resnet_flax.run import errors


class Chip(NamedTuple):
  """A generation of TPUs; the figures count a whole chip."""

  # bfloat16 operations per second. Float32 convolutions also use bfloat16
  # products, unless they request a higher precision.
  flops: float
  memory_bytes: float  # Of HBM.
  bandwidth: float  # Bytes of HBM traffic per second.
  num_cores: int  # TensorCores; a device has one or all of them.
  example: str  # A topology that the compiler accepts.
  # 'megacore' joins a chip's cores to one device, as on a TPU VM, if the
  # compiler's default does not.
  config: str = "default"


# Sources: https://cloud.google.com/tpu/docs/v4, v5e, v5p and v6e.
CHIPS = {
  "v4": Chip(275e12, 32 * 2**30, 1200e9, 2, "v4:2x2x1", config="megacore"),
  "v5e": Chip(197e12, 16e9, 819e9, 1, "v5e:2x4"),
  "v5p": Chip(459e12, 95e9, 2765e9, 2, "v5p:2x2x1"),
  "v6e": Chip(918e12, 32e9, 1600e9, 1, "v6e:2x4"),
}


def of_topology(topology: str) -> Chip:
  """The chip of a topology such as 'v5e:2x4'; `ConfigError` if it has none."""
  name, _, sizes = topology.partition(":")
  if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", sizes):
    raise unknown(topology)
  return CHIPS[name]


def unknown(topology: str, why: str = "") -> errors.ConfigError:
  """The error for a topology that the compiler does not accept."""
  examples = ", ".join(chip.example for chip in CHIPS.values())
  return errors.ConfigError(
    f"--topology={topology}{why and f' ({why})'} must be a generation and its"
    f" chips in each direction, for example {examples}."
  )


def roofline(
  chip: Chip, cores_of_device: int, flops: float, num_bytes: float
) -> dict[str, Any]:
  """The least time that a device needs for so many operations and bytes.

  Gives `compute_seconds`, `memory_seconds` and the longer time as `seconds`.
  """
  share = cores_of_device / chip.num_cores
  compute = flops / (chip.flops * share)
  memory = num_bytes / (chip.bandwidth * share)
  return {
    "compute_seconds": compute,
    "memory_seconds": memory,
    "seconds": max(compute, memory),
  }
