"""Scores a split: every image exactly once, at any batch or device count."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from resnet_flax import datasets, mesh as mesh_lib, train_step

EvalStep = Callable[..., train_step.MetricSums]


def padded_batches(
  split: datasets.Split, batch_size: int, num_devices: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """The split in order, in batches of one size that the devices divide.

  Args:
    split: what to go through.
    batch_size: images of a batch, at most; rounded up to a multiple of
      `num_devices`.
    num_devices: devices that share a batch.

  Yields:
    (uint8[B, H, W, C], int32[B], bool[B]); the mask is False for the padding
    of the last batch.
  """
  batch_size = min(batch_size, len(split))
  batch_size = -(-batch_size // num_devices) * num_devices
  for start in range(0, len(split), batch_size):
    stop = min(start + batch_size, len(split))
    images, labels = split.take(np.arange(start, stop))
    mask = np.arange(batch_size) < stop - start
    missing = batch_size - (stop - start)
    if missing:
      images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
      labels = np.pad(labels, (0, missing))
    yield images, labels, mask


def jit_eval_step(experiment: train_step.Experiment) -> EvalStep:
  """The jitted function of (state, images, labels, mask) that scores."""
  return jax.jit(functools.partial(train_step.eval_step, experiment))


def evaluate(
  eval_step: EvalStep,
  state: train_step.TrainState,
  split: datasets.Split,
  batch_size: int,
  mesh: Mesh,
  on_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
  """The mean loss, objective and accuracy over a split.

  Args:
    eval_step: compiled `train_step.eval_step` of (state, images, labels,
      mask).
    state: what is scored, replicated over the mesh.
    split: images and labels.
    batch_size: images of a call, at most.
    mesh: the devices.
    on_batch: called after every call.

  Returns:
    `loss` (cross-entropy), `objective` (with the L2 term) and `accuracy` (a
    fraction).
  """
  totals = np.zeros(4)
  pending: Any = None
  for batch in padded_batches(split, batch_size, mesh.size):
    sums = eval_step(state, *mesh_lib.shard_batch(mesh, *batch))
    # Read one call late: the devices have the next one to work on meanwhile.
    if pending is not None:
      totals += _to_host(pending)
    pending = sums
    on_batch()
  totals += _to_host(pending)
  loss, objective, correct, count = totals
  if count != len(split):
    raise AssertionError(f"scored {count:.0f} of {len(split)} images")
  return {
    "loss": loss / count,
    "objective": objective / count,
    "accuracy": correct / count,
  }


def _to_host(sums: train_step.MetricSums) -> np.ndarray:
  sums = jax.device_get(sums)
  return np.array(
    [sums.loss, sums.objective, sums.correct, sums.count], np.float64
  )
