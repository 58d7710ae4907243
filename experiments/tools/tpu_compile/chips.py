"""Published figures of TPU chips, and the time that they imply.

A roofline is a model: the time that a program would take if it did nothing but
its arithmetic at the peak rate, or nothing but its memory traffic at the peak
rate, whichever is longer (Williams et al. 2009). A real step is slower.
"""

import dataclasses
import re
from typing import Any

from resnet_flax.run import errors


@dataclasses.dataclass(frozen=True)
class Chip:
  """A generation of TPUs; figures are those of a whole chip.

  Attributes:
    flops: bfloat16 operations a second. Float32 convolutions are made of
      bfloat16 products too, unless a higher precision is asked for.
    memory_bytes: of HBM.
    bandwidth: bytes of HBM a second.
    num_cores: TensorCores, of which a device is one or all.
    example: a topology that can be compiled for.
    source: where the figures are published.
    config: how its cores are joined, as a TPU VM does: 'megacore' makes them
      one device where the compiler's own default does not.
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
  """The chip that a topology is made of.

  Args:
    topology: such as 'v5e:2x4', a generation and how many chips there are in
      each direction.

  Raises:
    ConfigError: it is not of this form, or the generation is not known.
  """
  name, _, sizes = topology.partition(":")
  if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", sizes):
    raise unknown(topology)
  return CHIPS[name]


def unknown(topology: str, why: str = "") -> errors.ConfigError:
  """The error for a topology that cannot be compiled for.

  Args:
    topology: what was given.
    why: what the compiler says of it.
  """
  examples = ", ".join(chip.example for chip in CHIPS.values())
  return errors.ConfigError(
    f"--topology={topology} cannot be used{why and f' ({why})'}. Pass a"
    f" generation and its chips in each direction, for example {examples}."
  )


def roofline(
  chip: Chip, cores_of_device: int, flops: float, num_bytes: float
) -> dict[str, Any]:
  """The least time that a device needs, by this model.

  Args:
    chip: of the device.
    cores_of_device: TensorCores of a device.
    flops: operations of one device.
    num_bytes: that it reads and writes.

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
