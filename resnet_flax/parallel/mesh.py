"""The device mesh: seeds over one axis, the batch over the other.

The train state is copied to all devices of its seed. Under `jax.jit` with these
shardings, batch statistics and gradients span the whole batch; XLA inserts the
collectives.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any

SEED, DATA = "seed", "data"


def num_groups(num_devices: int, num_seeds: int) -> int:
  """Into how many equal groups devices are divided, each with its own seeds.

  As few as give each seed a group of its own, or as many as there are devices.
  """
  return next(
    count
    for count in range(1, num_devices + 1)
    if num_devices % count == 0 and (count >= num_seeds or count == num_devices)
  )


def create_mesh(
  devices: Sequence[jax.Device] | None = None, num_seeds: int = 1
) -> Mesh:
  """A mesh of the given devices, by default of all: seeds x batch."""
  array = np.asarray(jax.devices() if devices is None else devices)
  groups = num_groups(array.size, num_seeds)
  return Mesh(
    array.reshape(groups, -1), (SEED, DATA), axis_types=(AxisType.Auto,) * 2
  )


def sharding(mesh: Mesh, *axes: str) -> NamedSharding:
  """Leading array axes divided over mesh axes; without any, a copy on each."""
  return NamedSharding(mesh, PartitionSpec(*axes))


def compiler_options(mesh: Mesh) -> dict[str, Any]:
  """What XLA is told when it compiles a training step for these devices."""
  if mesh.devices.flat[0].platform != "cpu":
    return {}
  # oneDNN's convolutions use all threads: two at a time, as this scheduler
  # arranges them, are slower than one after the other and need more memory.
  return {"xla_cpu_enable_concurrency_optimized_scheduler": False}


# ---- Between host and devices. With several processes, each puts its own part.


def put(
  tree: PyTree, sharding: NamedSharding, *, may_alias: bool | None = None
) -> PyTree:
  """Puts arrays, the same in all processes, on devices."""
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding, may_alias=may_alias)

  def put_own(leaf: Any) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(put_own(jax.random.key_data(leaf)))
    array = np.asarray(leaf)
    return _put_parts(sharding, array.shape, array.__getitem__)

  return jax.tree.map(put_own, tree)


def own_rows(sharding: NamedSharding, batch_size: int, axis: int) -> np.ndarray:
  """int64[rows], ascending: images of a batch for this process's devices."""
  if sharding.is_fully_addressable:
    return np.arange(batch_size)
  # Seeds are divided as they are over their devices: any number does.
  shape = (*(sharding.mesh.shape[SEED],) * axis, batch_size)
  indices = sharding.addressable_devices_indices_map(shape).values()
  rows = [np.arange(batch_size)[index[axis]] for index in indices if index]
  return np.unique(np.concatenate(rows))


def put_rows(
  tree: PyTree, sharding: NamedSharding, batch_size: int, axis: int
) -> PyTree:
  """Puts on devices arrays that hold, along `axis`, the `own_rows` of each."""
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)
  rows = own_rows(sharding, batch_size, axis)

  def put_own(array: np.ndarray) -> jax.Array:
    def part(index: tuple[slice, ...]) -> np.ndarray:
      start, stop, _ = index[axis].indices(batch_size)
      # The rows of a device are neighbours, here and in the batch.
      first = int(np.searchsorted(rows, start))
      own = slice(first, first + stop - start)
      return array[(*index[:axis], own, *index[axis + 1 :])]

    shape = (*array.shape[:axis], batch_size, *array.shape[axis + 1 :])
    return _put_parts(sharding, shape, part)

  return jax.tree.map(put_own, tree)


def _put_parts(
  sharding: NamedSharding,
  shape: tuple[int, ...],
  part: Callable[[Any], np.ndarray],
) -> jax.Array:
  # Each device its own copy: a step is given its state's memory.
  return jax.make_array_from_callback(
    shape, sharding, lambda index: np.array(part(index))
  )


def get(tree: PyTree, mesh: Mesh) -> PyTree:
  """Arrays of these devices as NumPy arrays; in all processes together."""
  if mesh.is_multi_process and not all(
    leaf.is_fully_addressable or leaf.is_fully_replicated
    for leaf in jax.tree.leaves(tree)
  ):
    tree = jax.jit(lambda tree: tree, out_shardings=sharding(mesh))(tree)
  return jax.device_get(tree)
