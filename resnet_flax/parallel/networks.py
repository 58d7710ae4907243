"""Several networks of one configuration, trained in one program.

They differ in their seeds. Devices are divided into groups, each of which
trains some of the seeds (see `mesh`); those of one group are trained in turn,
one call of the step after the other, or vectorised, in one call. A seed in turn
computes what it would alone on the devices of its group, to the bit.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from resnet_flax.parallel import mesh as mesh_lib

PyTree = Any

# How seeds that share a device are trained.
EXECUTIONS = ("in_turn", "vectorized")


class Networks(flax.struct.PyTreeNode):
  """A tree of arrays for each of several networks, on the devices.

  Attributes:
    calls: for each call of a step the trees of its networks, as one tree of
      arrays [networks, ...]; as it is where a call has only one.
  """

  calls: tuple[PyTree, ...]

  @property
  def step(self) -> jax.Array:
    """int32[], the steps that these train states have done."""
    # The same in all networks, of which other processes may have some.
    return jnp.ravel(self.calls[0].step.addressable_data(0))[0]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which network is trained where, and in which call of a step.

  One network is a plain tree, several are `Networks`; what is said of those
  below holds for either.

  Attributes:
    seeds: one for each network.
    mesh: the devices.
    per_call: networks of one call; the last one's may be filled up with copies
      whose results are ignored.
  """

  seeds: tuple[int, ...]
  mesh: Mesh
  per_call: int

  @classmethod
  def create(
    cls,
    config: ConfigDict,
    devices: Sequence[jax.Device] | None = None,
    execution: str = "in_turn",
  ) -> "Layout":
    """The layout of an experiment.

    Args:
      config: its `seed` and `num_seeds` are used.
      devices: by default all devices.
      execution: one of `EXECUTIONS`.
    """
    seeds = tuple(range(config.seed, config.seed + config.num_seeds))
    mesh = mesh_lib.create_mesh(devices, len(seeds))
    groups = mesh.shape[mesh_lib.SEED]
    at_once = 1
    if execution == "vectorized":
      at_once = -(-len(seeds) // groups)
    return cls(seeds, mesh, groups * at_once)

  @property
  def num_calls(self) -> int:
    """Calls of one step."""
    return -(-len(self.seeds) // self.per_call)

  @property
  def is_stacked(self) -> bool:
    """Whether the trees of a call have a leading axis of networks."""
    return self.per_call > 1

  def put(self, trees: Sequence[PyTree]) -> PyTree:
    """Puts a tree for each seed on the devices.

    Args:
      trees: of one structure, one for each seed.
    """
    calls = tuple(
      self._put_call([trees[position] for position in positions])
      for positions in self._positions()
    )
    return calls[0] if len(self.seeds) == 1 else Networks(calls)

  def shapes(self, tree: PyTree) -> PyTree:
    """What `put` makes of a tree for each seed, as shapes without values.

    Args:
      tree: of one seed; only its shapes and dtypes are used.

    Returns:
      `jax.ShapeDtypeStruct`s with shardings, on devices that need not exist.
    """
    leading = (self.per_call,) if self.is_stacked else ()
    sharding = self.call_sharding()
    call = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        (*leading, *leaf.shape), leaf.dtype, sharding=sharding
      ),
      tree,
    )
    return call if len(self.seeds) == 1 else Networks((call,) * self.num_calls)

  def get(self, networks: PyTree) -> list[PyTree]:
    """The tree of each seed, as NumPy arrays."""
    if len(self.seeds) == 1:
      return [mesh_lib.get(networks, self.mesh)]
    trees: list[PyTree] = []
    for call in mesh_lib.get(networks.calls, self.mesh):
      trees += unstack(call, self.per_call)
    return trees[: len(self.seeds)]

  def each(self, function: Callable[..., PyTree], *networks: PyTree) -> PyTree:
    """What a function makes of the trees of each call."""
    if len(self.seeds) == 1:
      return function(*networks)
    calls = zip(*(each.calls for each in networks), strict=True)
    return Networks(tuple(function(*trees) for trees in calls))

  def rows(self, batch_size: int) -> np.ndarray:
    """Which images of a batch this process feeds to its devices.

    Args:
      batch_size: images of a batch of one seed, over all devices.

    Returns:
      int64[rows], ascending; all of them but on several hosts.
    """
    return mesh_lib.own_rows(
      self._batch_sharding(), batch_size, int(self.is_stacked)
    )

  def batches(
    self,
    of_seed: Callable[[int], Iterable[tuple[np.ndarray, ...]]],
    batch_size: int,
  ) -> Iterator[tuple[Any, ...]]:
    """The batches of all seeds, on the devices.

    Args:
      of_seed: gives the batches of a seed, tuples of arrays [rows, ...] of what
        `rows` says.
      batch_size: images of a batch of one seed, over all devices.

    Yields:
      The arrays of a batch, for all seeds.
    """
    for batches in zip(*map(of_seed, self.seeds), strict=True):
      yield self._put_batches(batches, batch_size)

  def over_networks(
    self, function: Callable[..., PyTree], shared: int = 0
  ) -> Callable[..., PyTree]:
    """A function of one network's trees, as one of a call's.

    Args:
      function: of trees, returning one; not of `Networks`.
      shared: how many of its last arguments are the same for all networks.

    Returns:
      The function to be compiled.
    """
    if not self.is_stacked:
      return function
    groups = self.mesh.shape[mesh_lib.SEED]
    at_once = self.per_call // groups

    def of_group(*arguments: PyTree) -> PyTree:
      own = arguments[: len(arguments) - shared]
      others = arguments[len(arguments) - shared :]
      if at_once == 1:
        # As alone, to the bit.
        own = jax.tree.map(lambda leaf: leaf[0], own)
        return jax.tree.map(lambda leaf: leaf[None], function(*own, *others))
      axes = (0,) * len(own) + (None,) * shared
      return jax.vmap(function, in_axes=axes)(*arguments)

    if groups == 1:
      return of_group

    def of_call(*arguments: PyTree) -> PyTree:
      own = (PartitionSpec(mesh_lib.SEED),) * (len(arguments) - shared)
      return jax.shard_map(
        of_group,
        mesh=self.mesh,
        in_specs=own + (PartitionSpec(),) * shared,
        out_specs=PartitionSpec(mesh_lib.SEED),
        axis_names={mesh_lib.SEED},
        # The branches for platforms would have to agree on what varies.
        check_vma=False,
      )(*arguments)

    return of_call

  def in_turn(
    self, compiled: Callable[..., PyTree], shared: int = 0
  ) -> Callable[..., PyTree]:
    """A compiled function of a call's trees, as one of `Networks`.

    Args:
      compiled: from `over_networks`; returns a tree or a tuple of trees.
      shared: see there.
    """
    if len(self.seeds) == 1:
      return compiled

    def run(*arguments: PyTree) -> PyTree:
      own = arguments[: len(arguments) - shared]
      others = arguments[len(arguments) - shared :]
      results = [
        compiled(*(networks.calls[call] for networks in own), *others)
        for call in range(self.num_calls)
      ]
      if isinstance(results[0], tuple):
        return tuple(Networks(parts) for parts in zip(*results, strict=True))
      return Networks(tuple(results))

    return run

  def of_seed(self, seed: int) -> str:
    """' of seed N' for messages; nothing where there is only one."""
    return f" of seed {seed}" if len(self.seeds) > 1 else ""

  def call_sharding(self) -> jax.sharding.NamedSharding:
    """The sharding of the trees of a call."""
    if self.is_stacked:
      return mesh_lib.seed_sharding(self.mesh)
    return mesh_lib.replicated(self.mesh)

  def batch_shape(
    self, shape: Sequence[int], dtype: Any
  ) -> jax.ShapeDtypeStruct:
    """The batches of a call.

    Args:
      shape: of one network's, (B, ...).
      dtype: of all.
    """
    if self.is_stacked:
      shape = (self.per_call, *shape)
    return jax.ShapeDtypeStruct(
      tuple(shape), dtype, sharding=self._batch_sharding()
    )

  def _batch_sharding(self) -> jax.sharding.NamedSharding:
    if self.is_stacked:
      return mesh_lib.seed_batch_sharding(self.mesh)
    return mesh_lib.batch_sharding(self.mesh)

  def _positions(self) -> list[list[int]]:
    """For each call, which seed each of its networks has or copies."""
    last = len(self.seeds) - 1
    starts = range(0, self.num_calls * self.per_call, self.per_call)
    return [
      [min(start + place, last) for place in range(self.per_call)]
      for start in starts
    ]

  def _put_call(self, trees: Sequence[PyTree]) -> PyTree:
    tree = trees[0]
    if self.is_stacked:
      tree = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    # A step is given its state's memory, which must not be another's too.
    return mesh_lib.put(tree, self.call_sharding(), may_alias=False)

  def _put_batches(
    self, batches: Sequence[tuple[np.ndarray, ...]], batch_size: int
  ) -> tuple[Any, ...]:
    sharding = self._batch_sharding()
    calls = []
    for positions in self._positions():
      parts = [batches[position] for position in positions]
      call = parts[0]
      if self.is_stacked:
        call = tuple(np.stack(arrays) for arrays in zip(*parts, strict=True))
      calls.append(
        mesh_lib.put_rows(call, sharding, batch_size, int(self.is_stacked))
      )
    if len(self.seeds) == 1:
      return calls[0]
    return tuple(Networks(arrays) for arrays in zip(*calls, strict=True))


def stack(trees: Sequence[PyTree]) -> PyTree:
  """One tree of NumPy arrays [seeds, ...]; of a single tree itself."""
  if len(trees) == 1:
    return trees[0]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def unstack(tree: PyTree, count: int) -> list[PyTree]:
  """What `stack` was given: so many trees."""
  if count == 1:
    return [tree]
  return [
    jax.tree.map(lambda leaf, place=place: leaf[place], tree)
    for place in range(count)
  ]
