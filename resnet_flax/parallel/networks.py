"""The networks of a run, one for each seed, and where they are trained.

Devices are divided into groups (see `mesh`), each of which trains some of the
seeds. The networks that one call of a compiled function works on are a chunk:
one network of each group, or, where seeds that share a group are vectorized,
all of them. Chunks are worked on in turn. A seed in turn computes what it would
alone on the devices of its group: bit-identically, but on CPUs with several
devices in a group (see `kernels/convolution.py`).
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

  `chunks` has for each chunk the trees of its networks as one tree of arrays
  [networks, ...]; where chunks have one network, its tree as it is.
  """

  chunks: tuple[PyTree, ...]

  @property
  def step(self) -> int:
    """The steps that these train states have done, the same in all."""
    # Of which other processes may have some.
    return int(np.ravel(self.chunks[0].step.addressable_data(0))[0])


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which network is trained where, and in which chunk."""

  seeds: tuple[int, ...]  # One for each network.
  mesh: Mesh
  # The last chunk may be filled up with copies, whose results are ignored.
  chunk_size: int

  @classmethod
  def create(
    cls,
    config: ConfigDict,
    devices: Sequence[jax.Device] | None = None,
    execution: str = "in_turn",
  ) -> "Layout":
    """The layout of `num_seeds` seeds on these devices, by default on all.

    Those that share a group are trained 'in_turn' or 'vectorized'.
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
    """Of the trees of a chunk."""
    axes = (mesh_lib.SEED,) if self.is_stacked else ()
    return mesh_lib.sharding(self.mesh, *axes)

  @property
  def batch_sharding(self) -> NamedSharding:
    """Of the batches of a chunk: images divided over the devices of a group."""
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
    # A step is given its state's memory, which must not be another's too.
    return Networks(transfer.put(chunks, self.sharding, may_alias=False))

  def get(self, networks: Networks) -> list[PyTree]:
    """The tree of each seed, as NumPy arrays."""
    chunks = transfer.get(networks.chunks, self.mesh)
    trees = [tree for each in chunks for tree in unstack(each, self.chunk_size)]
    return trees[: len(self.seeds)]

  def shapes(
    self, tree: PyTree, sharding: NamedSharding | None = None
  ) -> Networks:
    """`put` of such a tree for each seed, as shapes; needs no devices."""
    leading = (self.chunk_size,) if self.is_stacked else ()
    chunk = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        (*leading, *leaf.shape), leaf.dtype, sharding=sharding or self.sharding
      ),
      tree,
    )
    return Networks((chunk,) * -(-len(self.seeds) // self.chunk_size))

  def batch_shape(self, shape: Sequence[int], dtype: Any) -> Networks:
    """Batches of each network, (B, ...), as `shapes` gives states."""
    return self.shapes(jax.ShapeDtypeStruct(shape, dtype), self.batch_sharding)

  def batches(
    self,
    of_seed: Callable[[int, np.ndarray], Iterable[tuple[np.ndarray, ...]]],
    batch_size: int,
  ) -> Iterator[tuple[Networks, ...]]:
    """The batches of all seeds, tuples of arrays, on the devices.

    `of_seed` gives those of a seed, of `batch_size` images over all devices:
    arrays that have the int64[rows] of each, which this process feeds.
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

  def of_chunk(
    self, function: Callable[..., PyTree], num_shared: int = 0
  ) -> Callable[..., PyTree]:
    """A function of one network's trees as one of a chunk's, to be compiled.

    Its last `num_shared` arguments are the same for all networks.
    """
    if not self.is_stacked:
      return function
    groups = self.mesh.shape[mesh_lib.SEED]

    def of_group(*arguments: PyTree) -> PyTree:
      num_own = len(arguments) - num_shared
      if self.chunk_size > groups:
        axes = (0,) * num_own + (None,) * num_shared
        return jax.vmap(function, in_axes=axes)(*arguments)
      # As alone.
      own = jax.tree.map(lambda leaf: leaf[0], arguments[:num_own])
      result = function(*own, *arguments[num_own:])
      return jax.tree.map(lambda leaf: leaf[None], result)

    if groups == 1:
      return of_group

    def of_chunk(*arguments: PyTree) -> PyTree:
      own = (PartitionSpec(mesh_lib.SEED),) * (len(arguments) - num_shared)
      return jax.shard_map(
        of_group,
        mesh=self.mesh,
        in_specs=own + (PartitionSpec(),) * num_shared,
        out_specs=PartitionSpec(mesh_lib.SEED),
        axis_names={mesh_lib.SEED},
        # The branches for platforms would have to agree on what varies.
        check_vma=False,
      )(*arguments)

    return of_chunk

  def in_turn(
    self, compiled: Callable[..., tuple[PyTree, ...]], num_shared: int = 0
  ) -> Callable[..., tuple[Networks, ...]]:
    """A compiled function of a chunk's trees as one of all networks'."""

    def run(*arguments: Any) -> tuple[Networks, ...]:
      num_own = len(arguments) - num_shared
      own, shared = arguments[:num_own], arguments[num_own:]
      results = self.map(lambda *trees: compiled(*trees, *shared), *own)
      return tuple(map(Networks, zip(*results.chunks, strict=True)))

    return run

  def of_seed(self, seed: int) -> str:
    """' of seed N' for messages; nothing where there is only one."""
    return f" of seed {seed}" if len(self.seeds) > 1 else ""


def stack(
  trees: Sequence[PyTree], join: Callable[..., Any] = np.stack
) -> PyTree:
  """One tree of arrays [seeds, ...]; of a single tree itself."""
  if len(trees) == 1:
    return trees[0]
  return jax.tree.map(lambda *arrays: join(arrays), *trees)


def unstack(tree: PyTree, count: int) -> list[PyTree]:
  """The trees that `stack` was given."""
  if count == 1:
    return [tree]
  return [jax.tree.map(lambda array, k=k: array[k], tree) for k in range(count)]
