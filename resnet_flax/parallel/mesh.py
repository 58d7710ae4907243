"""The device mesh: seeds over one axis, the batch over the other.

The train state is copied to all devices of its seed. Under `jax.jit` with these
shardings, batch statistics and gradients span the whole batch; XLA inserts the
collectives.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

SEED, DATA = "seed", "data"


def num_groups(num_devices: int, num_seeds: int) -> int:
  """The number of equal groups of devices; each trains its own seeds.

  The smallest possible number with a group for each seed, else `num_devices`.
  """
  return next(
    count
    for count in range(1, num_devices + 1)
    if num_devices % count == 0 and (count >= num_seeds or count == num_devices)
  )


def create_mesh(
  devices: Sequence[jax.Device] | None = None, num_seeds: int = 1
) -> Mesh:
  """A mesh, seeds x batch, of the given devices, by default of all."""
  array = np.asarray(jax.devices() if devices is None else devices)
  groups = num_groups(array.size, num_seeds)
  return Mesh(
    array.reshape(groups, -1), (SEED, DATA), axis_types=(AxisType.Auto,) * 2
  )


def sharding(mesh: Mesh, *axes: str) -> NamedSharding:
  """Divides leading array axes over mesh axes; without axes, copies to all."""
  return NamedSharding(mesh, PartitionSpec(*axes))


def compiler_options(mesh: Mesh) -> dict[str, Any]:
  """XLA's options for compiling a training step for these devices."""
  if mesh.devices.flat[0].platform != "cpu":
    return {}
  # This scheduler runs two of oneDNN's convolutions at a time. Each uses all
  # threads, so that is slower than one after the other and needs more memory.
  return {"xla_cpu_enable_concurrency_optimized_scheduler": False}
