"""The order in which an epoch takes images, and its batches."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from resnet_flax import data as datasets
from resnet_flax.data import randomness
from resnet_flax.parallel import networks as seeds_lib


def order(
  num_examples: int, batch_size: int, seed: int, epoch: int
) -> np.ndarray:
  """Which images each step of an epoch takes, as (seed, epoch) decide.

  A last, smaller batch is dropped.

  Args:
    num_examples: images of the training split.
    batch_size: images of a batch, over all devices.
    seed: the experiment's.
    epoch: 0-based.

  Returns:
    int64[steps, B], positions in the split.
  """
  rng = randomness.host_rng(seed, randomness.Purpose.EPOCH_ORDER, epoch)
  steps = num_examples // batch_size
  order = rng.permutation(num_examples)
  return order[: steps * batch_size].reshape(steps, batch_size)


def batches(
  split: datasets.Split,
  batch_size: int,
  epoch: int,
  layout: seeds_lib.Layout,
  *,
  first: int = 0,
) -> Iterator[tuple[Any, Any]]:
  """The batches of one epoch, for each seed in the order of `order`.

  Args:
    split: what is trained on.
    batch_size: images of a batch of one seed, over all devices.
    epoch: 0-based.
    layout: where the networks are.
    first: the step of the epoch to begin with, 0-based.

  Yields:
    (uint8[B, H, W, C], int32[B]) for all seeds, on their devices.
  """
  rows = layout.rows(batch_size)

  def of_seed(seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    positions = order(len(split), batch_size, seed, epoch)[first:, rows]
    return split.batches(list(positions), datasets.Draw(seed, epoch))

  return layout.batches(of_seed, batch_size)


def all_batches(
  split: datasets.Split,
  batch_size: int,
  layout: seeds_lib.Layout,
  first_epoch: int = 0,
) -> Iterator[tuple[Any, Any]]:
  """The batches of one epoch after the other, without end.

  Args:
    split: what is trained on.
    batch_size: images of a batch of one seed, over all devices.
    layout: where the networks are.
    first_epoch: 0-based.

  Yields:
    What `batches` does.
  """
  return itertools.chain.from_iterable(
    batches(split, batch_size, epoch, layout)
    for epoch in itertools.count(first_epoch)
  )
