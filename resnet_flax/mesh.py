"""The device mesh: the batch is divided over it, the state is copied to all.

Under `jax.jit` with these shardings, batch statistics and gradients span the
global batch; XLA inserts the collectives.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_AXIS = "data"


def create_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A one-dimensional mesh of the given devices, by default of all."""
  devices = jax.devices() if devices is None else devices
  return Mesh(np.asarray(devices), (_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of the train state: a copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its leading axis divided over the devices."""
  return NamedSharding(mesh, PartitionSpec(_AXIS))


def shard_batch(mesh: Mesh, *arrays: np.ndarray) -> Any:
  """Puts host arrays of one leading size, divisible by the devices, there."""
  return jax.device_put(arrays, batch_sharding(mesh))


def compiler_options(mesh: Mesh) -> dict[str, Any]:
  """What XLA is told when it compiles a training step for these devices."""
  if mesh.devices.flat[0].platform != "cpu":
    return {}
  # oneDNN's convolutions use all threads: two at a time, as this scheduler
  # arranges them, are slower than one after the other and need more memory.
  return {"xla_cpu_enable_concurrency_optimized_scheduler": False}
