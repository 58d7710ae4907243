"""The networks of a run, one for each seed, and where they are trained.

The devices are divided into groups (see `mesh`); each group trains some of the
seeds. A chunk is what one call of a compiled function works on: one network of
each group or, if seeds are vectorized, all. A chunk of one network, such as a
single seed's, has no leading axis, and `for_chunk` returns its function as it
is. Seeds 0 to 3 on two devices, in turn, are the chunks (0, 1) and (2, 3). A
seed trained in turn is bit-identical to a run of its own on the devices of its
group, except on CPUs with several devices in a group (see
`kernels/convolution.py`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from resnet_flax.parallel import mesh as mesh_lib, transfer

PyTree = Any


class Networks(flax.struct.PyTreeNode):
  """A tree of arrays for each network, on the devices.

  `chunks` holds one tree for each chunk: its networks' trees, stacked as arrays
  [networks, ...]. A chunk of one network holds that network's tree as it is.
  """

  chunks: tuple[PyTree, ...]

  @property
  def step(self) -> int:
    """The number of steps done, the same in all of these train states."""
    # Other processes may hold some of the states.
    return int(np.ravel(self.chunks[0].step.addressable_data(0))[0])


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which network is trained where, and in which chunk."""

  seeds: tuple[int, ...]  # One for each network.
  mesh: Mesh
  # Networks per chunk. Copies of the last network, whose results are ignored,
  # fill the last chunk.
  chunk_size: int

  @classmethod
  def create(
    cls,
    config: ConfigDict,
    devices: Sequence[jax.Device] | None = None,
    execution: str = "in_turn",
  ) -> "Layout":
    """The layout of `num_seeds` seeds on `devices`, by default on all.

    Seeds that share a group take turns, unless `execution` is 'vectorized'.
    """
    seeds = tuple(range(config.seed, config.seed + config.num_seeds))
    mesh = mesh_lib.create_mesh(devices, len(seeds))
    groups = mesh.shape[mesh_lib.SEED]
    at_once = -(-len(seeds) // groups) if execution == "vectorized" else 1
    return cls(seeds, mesh, groups * at_once)

  @property
  def is_stacked(self) -> bool:
    """Whether the trees of a chunk have a leading axis of networks."""
    return self.chunk_size > 1

  @property
  def sharding(self) -> NamedSharding:
    """The sharding of a chunk's trees."""
    axes = (mesh_lib.SEED,) if self.is_stacked else ()
    return mesh_lib.sharding(self.mesh, *axes)

  @property
  def batch_sharding(self) -> NamedSharding:
    """The sharding of a chunk's batches: a group's devices divide images."""
    return mesh_lib.sharding(self.mesh, *self.sharding.spec, mesh_lib.DATA)

  def _chunks(
    self, trees: Sequence[PyTree], join: Callable[..., Any] = np.stack
  ) -> Iterator[PyTree]:
    """Stacks the trees of the seeds, chunk by chunk."""
    size, last = self.chunk_size, len(trees) - 1
    for start in range(0, len(trees), size):
      yield stack([trees[min(start + k, last)] for k in range(size)], join)

  def put(self, trees: Sequence[PyTree]) -> Networks:
    """Puts the tree of each seed on the devices."""
    chunks = tuple(self._chunks(trees, jnp.stack))
    # A step donates its state's memory, so no other array may share it.
    return Networks(transfer.put(chunks, self.sharding, may_alias=False))

  def get(self, networks: Networks) -> list[PyTree]:
    """The tree of each seed, as NumPy arrays."""
    chunks = transfer.get(networks.chunks, self.mesh)
    trees = [tree for each in chunks for tree in unstack(each, self.chunk_size)]
    return trees[: len(self.seeds)]

  def shapes(
    self, tree: PyTree, sharding: NamedSharding | None = None
  ) -> Networks:
    """The shapes that `put` gives if every seed has a tree like this one."""
    leading = (self.chunk_size,) if self.is_stacked else ()
    chunk = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        (*leading, *leaf.shape), leaf.dtype, sharding=sharding or self.sharding
      ),
      tree,
    )
    return Networks((chunk,) * -(-len(self.seeds) // self.chunk_size))

  def batch_shape(self, shape: Sequence[int], dtype: Any) -> Networks:
    """The shapes of one batch for each network; `shape` is (B, ...)."""
    return self.shapes(jax.ShapeDtypeStruct(shape, dtype), self.batch_sharding)

  def batches(
    self,
    of_seed: Callable[[int, np.ndarray], Iterable[tuple[np.ndarray, ...]]],
    batch_size: int,
  ) -> Iterator[tuple[Networks, ...]]:
    """Puts the batches of all seeds on the devices, as tuples of arrays.

    `of_seed(seed, rows)` gives the seed's batches of `batch_size` images, cut
    to the `rows`, int64[R], for this process's devices.
    """
    sharding = self.batch_sharding
    rows = transfer.own_rows(sharding, batch_size)
    of_seeds = [of_seed(seed, rows) for seed in self.seeds]
    for batches in zip(*of_seeds, strict=True):
      chunks = [
        transfer.put_rows(each, sharding, batch_size)
        for each in self._chunks(batches)
      ]
      yield tuple(map(Networks, zip(*chunks, strict=True)))

  def map(self, function: Callable[..., PyTree], *trees: Networks) -> Networks:
    """Applies a function of trees to each chunk."""
    chunks = zip(*(each.chunks for each in trees), strict=True)
    return Networks(tuple(itertools.starmap(function, chunks)))

  def for_chunk(
    self, function: Callable[..., PyTree], num_shared: int = 0
  ) -> Callable[..., PyTree]:
    """Turns a function of one network's trees into one of a chunk's trees.

    Its last `num_shared` arguments are the same for all networks.
    """
    if not self.is_stacked:
      return function
    groups = self.mesh.shape[mesh_lib.SEED]

    def for_group(*arguments: PyTree) -> PyTree:
      num_own = len(arguments) - num_shared
      if self.chunk_size > groups:
        axes = (0,) * num_own + (None,) * num_shared
        return jax.vmap(function, in_axes=axes)(*arguments)
      # A group's only network runs without vmap, as in a run of one seed.
      unstacked = jax.tree.map(lambda leaf: leaf[0], arguments[:num_own])
      result = function(*unstacked, *arguments[num_own:])
      return jax.tree.map(lambda leaf: leaf[None], result)

    if groups == 1:
      return for_group

    def for_groups(*arguments: PyTree) -> PyTree:
      specs = (PartitionSpec(mesh_lib.SEED),) * (len(arguments) - num_shared)
      return jax.shard_map(
        for_group,
        mesh=self.mesh,
        in_specs=specs + (PartitionSpec(),) * num_shared,
        out_specs=PartitionSpec(mesh_lib.SEED),
        axis_names={mesh_lib.SEED},
        # With the check, branches for platforms must agree on what varies.
        check_vma=False,
      )(*arguments)

    return for_groups

  def for_networks(
    self, compiled: Callable[..., tuple[PyTree, ...]], num_shared: int = 0
  ) -> Callable[..., tuple[Networks, ...]]:
    """Turns a compiled function of a chunk's trees into one of `Networks`."""

    def run(*arguments: Any) -> tuple[Networks, ...]:
      num_own = len(arguments) - num_shared
      own, shared = arguments[:num_own], arguments[num_own:]
      results = self.map(lambda *trees: compiled(*trees, *shared), *own)
      return tuple(map(Networks, zip(*results.chunks, strict=True)))

    return run

  def seed_suffix(self, seed: int) -> str:
    """' of seed N' for a message; '' if there is only one seed."""
    return f" of seed {seed}" if len(self.seeds) > 1 else ""


def stack(
  trees: Sequence[PyTree], join: Callable[..., Any] = np.stack
) -> PyTree:
  """Stacks trees into arrays [seeds, ...]; returns a single tree as it is."""
  if len(trees) == 1:
    return trees[0]
  return jax.tree.map(lambda *arrays: join(arrays), *trees)


def unstack(tree: PyTree, count: int) -> list[PyTree]:
  """The trees that `stack` was given."""
  if count == 1:
    return [tree]
  return [jax.tree.map(lambda array, k=k: array[k], tree) for k in range(count)]
