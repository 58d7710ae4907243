"""Moves arrays between host and devices; each process puts its own part."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from resnet_flax.parallel import mesh as mesh_lib

PyTree = Any


def put(
  tree: PyTree, sharding: NamedSharding, *, may_alias: bool | None = None
) -> PyTree:
  """Puts arrays on devices; all processes must pass the same arrays."""
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding, may_alias=may_alias)

  def put_own(leaf: Any) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      data = put_own(jax.random.key_data(leaf))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    array = np.asarray(leaf)
    return _put_parts(sharding, array.shape, array.__getitem__)

  return jax.tree.map(put_own, tree)


def own_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
  """The rows of a batch for this process's devices, int64 and ascending."""
  if sharding.is_fully_addressable:
    return np.arange(batch_size)
  axis = sharding.spec.index(mesh_lib.DATA)
  # The rows do not depend on the number of seeds: the mesh's axis is enough.
  shape = (*(sharding.mesh.shape[mesh_lib.SEED],) * axis, batch_size)
  indices = sharding.addressable_devices_indices_map(shape).values()
  rows = [np.arange(batch_size)[index[axis]] for index in indices if index]
  return np.unique(np.concatenate(rows))


def put_rows(tree: PyTree, sharding: NamedSharding, batch_size: int) -> PyTree:
  """Puts batches on devices; each process passes its `own_rows` of them."""
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)
  rows = own_rows(sharding, batch_size)
  axis = sharding.spec.index(mesh_lib.DATA)

  def put_own(array: np.ndarray) -> jax.Array:
    def part(index: tuple[slice, ...]) -> np.ndarray:
      start, stop, _ = index[axis].indices(batch_size)
      # A device's rows are contiguous, both in `rows` and in the batch.
      device_rows = slice(*np.searchsorted(rows, (start, stop)))
      return array[(*index[:axis], device_rows)]

    shape = (*array.shape[:axis], batch_size, *array.shape[axis + 1 :])
    return _put_parts(sharding, shape, part)

  return jax.tree.map(put_own, tree)


def _put_parts(
  sharding: NamedSharding,
  shape: tuple[int, ...],
  part: Callable[[Any], np.ndarray],
) -> jax.Array:
  # Each device gets its own copy, since a step donates its state's memory.
  return jax.make_array_from_callback(
    shape, sharding, lambda index: np.array(part(index))
  )


def get(tree: PyTree, mesh: Mesh) -> PyTree:
  """Arrays as NumPy arrays; all processes must call this together."""
  if mesh.is_multi_process and not all(
    leaf.is_fully_addressable or leaf.is_fully_replicated
    for leaf in jax.tree.leaves(tree)
  ):
    everywhere = mesh_lib.sharding(mesh)
    tree = jax.jit(_same, out_shardings=everywhere)(tree)
  return jax.device_get(tree)


def _same(tree: PyTree) -> PyTree:
  """Returns its argument. JAX would compile a new lambda at each call."""
  return tree
