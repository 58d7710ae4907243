"""The compiled training step and the batches that it takes."""

import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_flax import step as step_lib
from resnet_flax.data import randomness, types
from resnet_flax.parallel import hosts, mesh as mesh_lib
from resnet_flax.parallel.networks import Layout, Networks

_logger = logging.getLogger(__name__)


class Batch(NamedTuple):
  """The arguments of one call of the compiled step, besides the state."""

  num_steps: int  # Training steps in this call.
  arguments: tuple[Any, ...]  # For `Program.compiled`, after the state.
  # Makes the first step's images, uint8[B, H, W, C], and labels, int32[B].
  images_and_labels: Callable[[], tuple[Networks, ...]]


class Program(NamedTuple):
  """How a run trains: its compiled step and its batches."""

  # The compiled step; takes the states and a batch's arguments.
  compiled: Callable[..., tuple[Networks, ...]]
  # Takes an epoch and a step within it, 0-based; yields batches from there on.
  batches: Callable[[int, int], Iterator[Batch]]

  def step(self, state: Networks, batch: Batch) -> tuple[Networks, ...]:
    """New states and the call's `StepMetrics`; donates the old states."""
    return self.compiled(state, *batch.arguments)


def create(
  config: ConfigDict,
  experiment: step_lib.Experiment,
  state: Networks,
  split: types.Split,
  key: Networks,
  layout: Layout,
) -> Program:
  """The program that does one step per call.

  Only the shapes of `state` are used. `key` is the augmentation key[] of each
  network.
  """
  size = config.batch_size
  compiled = compile_function(
    "training step",
    functools.partial(step_lib.train_step, experiment),
    layout,
    step_arguments(experiment, state, size, key, layout),
    donate=True,
  )

  def batches(epoch: int, first: int) -> Iterator[Batch]:
    for batch in epoch_batches(split, size, epoch, layout, first):
      yield Batch(1, (*batch, key), functools.partial(tuple, batch))

  return Program(compiled, batches)


def order(
  num_examples: int, batch_size: int, seed: int, epoch: int
) -> np.ndarray:
  """The order of an epoch: positions in the split, int64[steps, B].

  Drawn from (seed, epoch) alone. A last, smaller batch is dropped.
  """
  rng = randomness.host_rng(seed, randomness.Purpose.EPOCH_ORDER, epoch)
  steps = num_examples // batch_size
  positions = rng.permutation(num_examples)
  return positions[: steps * batch_size].reshape(steps, batch_size)


def epoch_batches(
  split: types.Split,
  batch_size: int,
  epoch: int,
  layout: Layout,
  first: int = 0,
) -> Iterator[tuple[Networks, ...]]:
  """The batches of an epoch from step `first` on, on the devices.

  Each has the images, uint8[B, H, W, C], and labels, int32[B], of all networks.
  """

  def of_seed(seed: int, rows: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    positions = order(len(split), batch_size, seed, epoch)[first:, rows]
    return split.batches(list(positions), types.Draw(seed, epoch))

  return layout.batches(of_seed, batch_size)


def trace(
  function: Callable[..., tuple[Any, ...]],
  layout: Layout,
  per_network: Sequence[Networks],
  shared: Sequence[Any] = (),
  *,
  donate: bool = False,
) -> jax.stages.Traced:
  """Traces a function of one network's trees for a chunk of networks.

  Needs no device: shapes, as from `Layout.shapes`, can stand for arrays. The
  function takes the arguments `per_network`, then the `shared` arguments.
  `donate` gives the first argument's memory to the result.
  """
  jitted = jax.jit(
    layout.for_chunk(function, len(shared)),
    donate_argnums=0 if donate else (),
    out_shardings=layout.sharding,
  )
  # All chunks have the same shapes.
  return jitted.trace(
    *(networks.chunks[0] for networks in per_network), *shared
  )


def compile_function(
  title: str,
  function: Callable[..., tuple[Any, ...]],
  layout: Layout,
  per_network: Sequence[Networks],
  shared: Sequence[Any] = (),
  *,
  donate: bool = False,
) -> Callable[..., tuple[Networks, ...]]:
  """Compiles a function of a network's trees for all networks; see `trace`."""
  started = time.perf_counter()
  _logger.info("compiling the %s", title)
  traced = trace(function, layout, per_network, shared, donate=donate)
  compiled = traced.lower().compile(mesh_lib.compiler_options(layout.mesh))
  hosts.meet()
  _logger.info("compiled in %.1f s", time.perf_counter() - started)
  return layout.for_networks(compiled, len(shared))


def step_arguments(
  experiment: step_lib.Experiment,
  state: Networks,
  batch_size: int,
  key: Networks,
  layout: Layout,
) -> tuple[Networks, ...]:
  """Arguments with `step.train_step`'s shapes, for `compile_function`."""
  images = layout.batch_shape((batch_size, *experiment.image_shape), np.uint8)
  return state, images, layout.batch_shape((batch_size,), np.int32), key
