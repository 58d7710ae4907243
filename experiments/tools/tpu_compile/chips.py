"""Published figures of TPU chips, and a step's time by the roofline model.

The model takes the longer of two times: the arithmetic at its peak rate, and
the memory traffic at its peak rate (Williams et al. 2009). A real step is
slower.
"""

import dataclasses
import re
from typing import Any

from resnet_flax.run import errors


@dataclasses.dataclass(frozen=True)
class Chip:
  """A generation of TPUs; the figures count a whole chip.

  Attributes:
    flops: bfloat16 operations per second. Float32 convolutions also use
      bfloat16 products, unless they request a higher precision.
    memory_bytes: bytes of HBM.
    bandwidth: bytes of HBM traffic per second.
    num_cores: number of TensorCores; a device has one or all of them.
    example: a topology that the compiler accepts.
    source: the publication of the figures.
    config: 'megacore' joins a chip's cores to one device, as on a TPU VM, if
      the compiler's default does not.
  """

  flops: float
  memory_bytes: float
  bandwidth: float
  num_cores: int
  example: str
  source: str
  config: str = "default"


CHIPS = {
  "v4": Chip(
    275e12,
    32 * 2**30,
    1200e9,
    2,
    "v4:2x2x1",
    "https://cloud.google.com/tpu/docs/v4",
    config="megacore",
  ),
  "v5e": Chip(
    197e12,
    16e9,
    819e9,
    1,
    "v5e:2x4",
    "https://cloud.google.com/tpu/docs/v5e",
  ),
  "v5p": Chip(
    459e12,
    95e9,
    2765e9,
    2,
    "v5p:2x2x1",
    "https://cloud.google.com/tpu/docs/v5p",
  ),
  "v6e": Chip(
    918e12,
    32e9,
    1600e9,
    1,
    "v6e:2x4",
    "https://cloud.google.com/tpu/docs/v6e",
  ),
}


def of_topology(topology: str) -> Chip:
  """Returns the chip of a topology.

  Args:
    topology: a generation and its number of chips in each direction, such as
      'v5e:2x4'.

  Raises:
    ConfigError: the topology has another form or an unknown generation.
  """
  name, _, sizes = topology.partition(":")
  if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", sizes):
    raise unknown(topology)
  return CHIPS[name]


def unknown(topology: str, why: str = "") -> errors.ConfigError:
  """Makes the error for a topology that the compiler does not accept.

  Args:
    topology: the given topology.
    why: the compiler's message.
  """
  examples = ", ".join(chip.example for chip in CHIPS.values())
  return errors.ConfigError(
    f"--topology={topology}{why and f' ({why})'} must be a generation and its"
    f" chips in each direction, for example {examples}."
  )


def roofline(
  chip: Chip, cores_of_device: int, flops: float, num_bytes: float
) -> dict[str, Any]:
  """Computes the least time that a device needs, by the roofline model.

  Args:
    chip: the device's chip.
    cores_of_device: TensorCores of a device.
    flops: operations of one device.
    num_bytes: bytes that the device reads and writes.

  Returns:
    `compute_seconds`, `memory_seconds` and the longer of them as `seconds`.
  """
  share = cores_of_device / chip.num_cores
  compute = flops / (chip.flops * share)
  memory = num_bytes / (chip.bandwidth * share)
  return {
    "compute_seconds": compute,
    "memory_seconds": memory,
    "seconds": max(compute, memory),
  }
