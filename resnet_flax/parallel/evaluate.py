"""Scores each image of a split exactly once, for any batch size and devices."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_flax import step as step_lib
from resnet_flax.data import types
from resnet_flax.parallel import averaging, mesh as mesh_lib, transfer
from resnet_flax.parallel.networks import Layout, Networks

EvalStep = Callable[..., tuple[Networks, ...]]


@dataclasses.dataclass(frozen=True)
class Scores:
  """The scores of all networks on a split."""

  # Each network's means of `metric_sums`: `loss`, `accuracy` (a fraction)...
  networks: list[dict[str, float]]
  # Of the networks' mean probabilities, without `objective`; None for a single
  # network.
  ensemble: dict[str, float] | None


def create_eval_step(
  experiment: step_lib.Experiment, layout: Layout
) -> EvalStep:
  """Jits `step.eval_step` for all networks: (state, images, labels, mask)."""
  function = functools.partial(step_lib.eval_step, experiment)
  jitted = jax.jit(layout.for_chunk(function, num_shared=3))
  return layout.for_networks(jitted, num_shared=3)


def padded_batches(
  split: types.Split, batch_size: int, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Batches of a split, in its order; only the given rows of each batch.

  `rows`, int64[R], are ascending positions in a batch of `batch_size`. Yields R
  images, as `Split.batches` does, int32[R] labels and a mask, bool[R], which is
  False for the padding at the end of the last batch.
  """
  positions = np.arange(len(split))
  order = [
    positions[start : start + batch_size][rows[rows < len(split) - start]]
    for start in range(0, len(split), batch_size)
  ]
  for images, labels in split.batches(order):
    mask = np.arange(len(rows)) < len(labels)
    if missing := len(rows) - len(labels):
      images = np.pad(images, ((0, missing), *((0, 0),) * (images.ndim - 1)))
      labels = np.pad(labels, (0, missing))
    yield images, labels, mask


def call_size(split: types.Split, batch_size: int, num_devices: int) -> int:
  """The number of images that a call scores, a multiple of `num_devices`.

  Before rounding up, a call has at most `batch_size` crops, or a single image.
  """
  size = min(max(batch_size // split.num_crops, 1), len(split))
  return -(-size // num_devices) * num_devices


def evaluate(
  eval_step: EvalStep,
  state: Networks,
  split: types.Split,
  batch_size: int,
  layout: Layout,
  on_batch: Callable[[], None] = lambda: None,
) -> Scores:
  """Scores all networks on a split; calls `on_batch` after each batch."""
  size = call_size(split, batch_size, layout.mesh.shape[mesh_lib.DATA])
  sharding = mesh_lib.sharding(layout.mesh, mesh_lib.DATA)
  rows = transfer.own_rows(sharding, size)
  totals: list[dict[str, float]] = [{} for _ in layout.seeds]
  ensemble: dict[str, float] = {}

  def add(sums: Networks, probabilities: Networks, labels: Any) -> None:
    of_seeds = layout.get(sums)
    for total, seed_sums in zip(totals, of_seeds, strict=True):
      _add(total, seed_sums)
    if len(of_seeds) > 1:
      count = int(of_seeds[0]["count"])
      mean = np.asarray(layout.get(probabilities), np.float64).mean(axis=0)
      true_labels = transfer.get(labels, layout.mesh)
      _add(ensemble, _ensemble_sums(mean[:count], true_labels[:count]))

  pending: tuple[Any, ...] | None = None
  for own_batch in padded_batches(split, size, rows):
    batch = transfer.put_rows(own_batch, sharding, size)
    scored = eval_step(state, *batch)
    # Reads scores one call late, so that the devices do not wait for the host.
    if pending is not None:
      add(*pending)
    pending = (*scored, batch[1])
    on_batch()
  assert pending is not None  # No split is empty.
  add(*pending)
  return Scores(
    [_means(total, len(split)) for total in totals],
    _means(ensemble, len(split)) if ensemble else None,
  )


def evaluate_all(
  config: ConfigDict,
  epoch: int,
  eval_step: EvalStep,
  state: Networks,
  splits: Mapping[str, types.Split],
  layout: Layout,
  on_batch: Callable[[], None],
) -> dict[str, Scores]:
  """Scores after a 0-based epoch, by 'test', 'test_ema'...; {} if not due."""
  done = epoch + 1
  if done % config.eval_every_epochs and done < config.num_epochs:
    return {}
  scores = {}
  for weights in averaging.available(config, done):
    select = functools.partial(averaging.select, weights=weights)
    chosen = layout.map(select, state)
    for name, split in splits.items():
      scores[averaging.scored_as(name, weights)] = evaluate(
        eval_step, chosen, split, config.eval_batch_size, layout, on_batch
      )
  return scores


def _add(total: dict[str, float], sums: dict[str, Any]) -> None:
  """Adds a batch's sums to a split's totals, in float64."""
  for name, value in sums.items():
    total[name] = total.get(name, 0.0) + float(value)


def _means(total: dict[str, float], num_images: int) -> dict[str, float]:
  count = total["count"]
  if count != num_images:
    raise AssertionError(f"scored {count:.0f} of {num_images} images")
  return {k: v / count for k, v in total.items() if k != "count"}


def _ensemble_sums(
  probabilities: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
  """The metrics of the networks' mean probabilities, float64[B, classes]."""
  of_labels = probabilities[np.arange(len(labels)), labels]
  # A probability of 0 was too small for float32; its logarithm stays finite.
  least = np.finfo(np.float32).tiny
  sums = {
    "loss": -np.sum(np.log(np.maximum(of_labels, least))),
    "accuracy": np.sum(np.argmax(probabilities, axis=-1) == labels),
    "count": len(labels),
  }
  if probabilities.shape[-1] >= 10:
    sums["top5"] = np.sum(step_lib.in_top5(probabilities, labels))
  return sums
