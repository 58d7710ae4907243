"""Scores a split: every image exactly once, at any batch or device count."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from resnet_flax import data as datasets, step as train_step
from resnet_flax.parallel import mesh as mesh_lib, networks as seeds

EvalStep = Callable[..., Any]


def padded_batches(
  split: datasets.Split, batch_size: int, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """The split in order, in batches of one size.

  Args:
    split: what to go through.
    batch_size: images of a batch, from `call_size`.
    rows: int64[R], which images of each batch are wanted, ascending.

  Yields:
    (uint8[R, H, W, C], int32[R], bool[R]); the mask is False for the padding
    of the last batch, which comes last.
  """
  positions = np.arange(len(split))
  starts = range(0, len(split), batch_size)
  order = [
    positions[start : start + batch_size][rows[rows < len(split) - start]]
    for start in starts
  ]
  for images, labels in split.batches(order):
    mask = np.arange(len(rows)) < len(labels)
    missing = len(rows) - len(labels)
    if missing:
      images = np.pad(images, ((0, missing), *((0, 0),) * (images.ndim - 1)))
      labels = np.pad(labels, (0, missing))
    yield images, labels, mask


def call_size(split: datasets.Split, batch_size: int, num_devices: int) -> int:
  """How many images of a split are scored in one call.

  Args:
    split: what is scored.
    batch_size: images of a call, at most, all crops counted; rounded up to a
      multiple of `num_devices`.
    num_devices: devices that share a call.
  """
  size = min(max(batch_size // split.num_crops, 1), len(split))
  return -(-size // num_devices) * num_devices


@dataclasses.dataclass(frozen=True)
class Scores:
  """How networks do on a split.

  Attributes:
    networks: for each its `loss` (mean cross-entropy), `objective` (with the L2
      term) and `accuracy` (a fraction).
    ensemble: `loss` and `accuracy` of the mean of their probabilities; None for
      a single network.
  """

  networks: list[dict[str, float]]
  ensemble: dict[str, float] | None


def jit_eval_step(
  experiment: train_step.Experiment, layout: seeds.Layout
) -> EvalStep:
  """The jitted function of (state, images, labels, mask) that scores."""
  return layout.in_turn(jit_eval_call(experiment, layout), shared=3)


def jit_eval_call(
  experiment: train_step.Experiment, layout: seeds.Layout
) -> jax.stages.Wrapped:
  """The same of one call's networks; see `seeds.Layout`."""
  function = functools.partial(train_step.eval_step, experiment)
  return jax.jit(layout.over_networks(function, shared=3))


def evaluate(
  eval_step: EvalStep,
  state: train_step.TrainState | seeds.Networks,
  split: datasets.Split,
  batch_size: int,
  layout: seeds.Layout,
  on_batch: Callable[[], None] = lambda: None,
) -> Scores:
  """Scores all networks on a split.

  Args:
    eval_step: from `jit_eval_step`.
    state: what is scored.
    split: images and labels.
    batch_size: images of a call, at most; each of several crops is one.
    layout: where the networks are.
    on_batch: called after every call.
  """
  size = call_size(split, batch_size, layout.mesh.shape[mesh_lib.DATA])
  sharding = mesh_lib.batch_sharding(layout.mesh)
  rows = mesh_lib.own_rows(sharding, size, axis=0)
  totals = _Totals(len(layout.seeds))
  pending: Any = None
  for start, own in zip(
    range(0, len(split), size), padded_batches(split, size, rows), strict=True
  ):
    batch = mesh_lib.put_rows(own, sharding, size, axis=0)
    scored = eval_step(state, *batch)
    # Read one call late: the devices have the next one to work on meanwhile.
    if pending is not None:
      totals.add(layout, *pending)
    _, labels, _ = batch
    pending = scored, labels, min(size, len(split) - start)
    on_batch()
  totals.add(layout, *pending)
  return totals.scores(len(split))


class _Totals:
  """Sums over the batches of a split."""

  def __init__(self, num_networks: int):
    # Loss, objective, correct, count.
    self._networks = np.zeros((num_networks, 4))
    # Loss, correct.
    self._ensemble = np.zeros(2)

  def add(
    self, layout: seeds.Layout, scored: Any, labels: jax.Array, count: int
  ) -> None:
    """Adds a batch.

    Args:
      layout: where the networks are.
      scored: what `eval_step` returned.
      labels: int32[B], on the devices.
      count: images, after which there is padding.
    """
    sums, probabilities = scored
    for place, part in enumerate(layout.get(sums)):
      self._networks[place] += [
        part.loss,
        part.objective,
        part.correct,
        part.count,
      ]
    if len(self._networks) == 1:
      return
    stacked = np.asarray(layout.get(probabilities), np.float64)
    mean = stacked.mean(axis=0)[:count]
    true = mesh_lib.get(labels, layout.mesh)[:count]
    chosen = mean[np.arange(count), true]
    # A float32 probability of zero stands for one that is too small for it.
    least = np.finfo(np.float32).tiny
    self._ensemble[0] -= np.sum(np.log(np.maximum(chosen, least)))
    self._ensemble[1] += np.sum(np.argmax(mean, axis=-1) == true)

  def scores(self, num_images: int) -> Scores:
    """The means over all images, whose number is checked."""
    networks = []
    for loss, objective, correct, count in self._networks:
      if count != num_images:
        raise AssertionError(f"scored {count:.0f} of {num_images} images")
      networks.append(
        {
          "loss": loss / count,
          "objective": objective / count,
          "accuracy": correct / count,
        }
      )
    if len(networks) == 1:
      return Scores(networks, None)
    loss, correct = self._ensemble / num_images
    return Scores(networks, {"loss": loss, "accuracy": correct})
