"""Scores a split: every image exactly once, at any batch or device count."""

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
  """How networks do on a split."""

  # Of each the means of `step.metric_sums`: `loss`, `accuracy` (a fraction)...
  networks: list[dict[str, float]]
  # `loss`, `accuracy`... of their mean probabilities; None for one network.
  ensemble: dict[str, float] | None


def create_eval_step(
  experiment: step_lib.Experiment, layout: Layout
) -> EvalStep:
  """The jitted function of (state, images, labels, mask) that scores."""
  function = functools.partial(step_lib.eval_step, experiment)
  jitted = jax.jit(layout.of_chunk(function, num_shared=3))
  return layout.in_turn(jitted, num_shared=3)


def padded_batches(
  split: types.Split, batch_size: int, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """The split in order, in batches of `batch_size`; of each only some rows.

  `rows`, int64[R] and ascending, says which. Yields R images, as
  `Split.batches` does, int32[R] labels and bool[R], which is False for the
  padding at the end of the last batch.
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
  """Images that a call scores: a multiple of the devices that share it.

  At most `batch_size`, all crops counted, before it is rounded up.
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
  """Scores all networks on a split."""
  size = call_size(split, batch_size, layout.mesh.shape[mesh_lib.DATA])
  sharding = mesh_lib.sharding(layout.mesh, mesh_lib.DATA)
  rows = transfer.own_rows(sharding, size)
  totals: list[dict[str, float]] = [{} for _ in layout.seeds]
  ensemble: dict[str, float] = {}

  def add(sums: Networks, probabilities: Networks, labels: Any) -> None:
    of_seeds = layout.get(sums)
    for total, of_seed in zip(totals, of_seeds, strict=True):
      _add(total, of_seed)
    if len(of_seeds) > 1:
      count = int(of_seeds[0]["count"])
      mean = np.asarray(layout.get(probabilities), np.float64).mean(axis=0)
      true = transfer.get(labels, layout.mesh)
      _add(ensemble, _ensemble_sums(mean[:count], true[:count]))

  pending: tuple[Any, ...] | None = None
  for own in padded_batches(split, size, rows):
    batch = transfer.put_rows(own, sharding, size)
    scored = eval_step(state, *batch)
    # Read one call late: the devices have the next one to work on meanwhile.
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
  """Scores after a 0-based epoch, if it is scored: of 'test', 'test_ema'..."""
  done = epoch + 1
  if done % config.eval_every_epochs and done < config.num_epochs:
    return {}
  scores = {}
  for weights in averaging.present(config, done):
    select = functools.partial(averaging.select, weights=weights)
    chosen = layout.map(select, state)
    for name, split in splits.items():
      scores[averaging.scored_as(name, weights)] = evaluate(
        eval_step, chosen, split, config.eval_batch_size, layout, on_batch
      )
  return scores


def _add(total: dict[str, float], sums: dict[str, Any]) -> None:
  """Adds the sums of a batch to those of a split, in float64."""
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
  """Of the mean probabilities, float64[B, classes], of several networks."""
  chosen = probabilities[np.arange(len(labels)), labels]
  # A float32 probability of zero stands for one that is too small for it.
  least = np.finfo(np.float32).tiny
  sums = {
    "loss": -np.sum(np.log(np.maximum(chosen, least))),
    "accuracy": np.sum(np.argmax(probabilities, axis=-1) == labels),
    "count": len(labels),
  }
  if probabilities.shape[-1] >= 10:
    sums["top5"] = np.sum(step_lib.in_top5(probabilities, labels))
  return sums
