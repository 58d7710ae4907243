"""What training repeats: the compiled step and the batches of an epoch."""

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
  """What one call of the step takes besides the state."""

  num_steps: int  # Training steps of the call.
  arguments: tuple[Any, ...]  # Of the compiled step, after the state.
  # Makes those of the call's first step: uint8[B, H, W, C] and int32[B].
  images_and_labels: Callable[[], tuple[Networks, ...]]


class Program(NamedTuple):
  """The training of a run on its devices."""

  # The compiled step, of states and a batch's arguments.
  compiled: Callable[..., tuple[Networks, ...]]
  # The batches of a 0-based epoch from one of its 0-based steps on.
  batches: Callable[[int, int], Iterator[Batch]]

  def step(self, state: Networks, batch: Batch) -> tuple[Networks, ...]:
    """The new states and the last step's `StepMetrics`; the old are donated."""
    return self.compiled(state, *batch.arguments)


def create(
  config: ConfigDict,
  experiment: step_lib.Experiment,
  state: Networks,
  split: types.Split,
  key: Networks,
  layout: Layout,
) -> Program:
  """The program that takes one step in a call.

  Of `state` only the shapes are used; `key` is the augmentation key[] of each
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
  """Which images each step of an epoch takes: int64[steps, B].

  Positions in the split, by (seed, epoch); a last, smaller batch is dropped.
  """
  rng = randomness.host_rng(seed, randomness.Purpose.EPOCH_ORDER, epoch)
  steps = num_examples // batch_size
  order = rng.permutation(num_examples)
  return order[: steps * batch_size].reshape(steps, batch_size)


def epoch_batches(
  split: types.Split,
  batch_size: int,
  epoch: int,
  layout: Layout,
  first: int = 0,
) -> Iterator[tuple[Networks, ...]]:
  """The batches of an epoch from step `first` on: images and labels.

  uint8[B, H, W, C] and int32[B] of all networks, on the devices.
  """

  def of_seed(seed: int, rows: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    positions = order(len(split), batch_size, seed, epoch)[first:, rows]
    return split.batches(list(positions), types.Draw(seed, epoch))

  return layout.batches(of_seed, batch_size)


def trace(
  function: Callable[..., tuple[Any, ...]],
  layout: Layout,
  own: Sequence[Networks],
  shared: Sequence[Any] = (),
  *,
  donate: bool = False,
) -> jax.stages.Traced:
  """Traces a function of one network's trees for a chunk of networks.

  Needs no device: shapes, as of `Layout.shapes`, stand for arrays. Each network
  has its `own` arguments, then come those that all share; with `donate` the
  first one's memory is for the result.
  """
  jitted = jax.jit(
    layout.of_chunk(function, len(shared)),
    donate_argnums=0 if donate else (),
    out_shardings=layout.sharding,
  )
  # All chunks are alike.
  return jitted.trace(*(networks.chunks[0] for networks in own), *shared)


def compile_function(
  title: str,
  function: Callable[..., tuple[Any, ...]],
  layout: Layout,
  own: Sequence[Networks],
  shared: Sequence[Any] = (),
  *,
  donate: bool = False,
) -> Callable[..., tuple[Networks, ...]]:
  """Compiles what `trace` traces, as a function of all networks' trees."""
  started = time.perf_counter()
  _logger.info("compiling the %s", title)
  traced = trace(function, layout, own, shared, donate=donate)
  compiled = traced.lower().compile(mesh_lib.compiler_options(layout.mesh))
  hosts.meet()
  _logger.info("compiled in %.1f s", time.perf_counter() - started)
  return layout.in_turn(compiled, len(shared))


def step_arguments(
  experiment: step_lib.Experiment,
  state: Networks,
  batch_size: int,
  key: Networks,
  layout: Layout,
) -> tuple[Networks, ...]:
  """The shapes that a function like `step.train_step` takes."""
  images = layout.batch_shape((batch_size, *experiment.image_shape), np.uint8)
  return state, images, layout.batch_shape((batch_size,), np.int32), key
