"""Choosing parts of a split: fixed, class-balanced or stratified."""

import numpy as np

from resnet_flax.data import randomness


def choose(
  labels: np.ndarray, num_train: int, num_held_out: int, split_seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Class-balanced training positions and stratified held-out ones.

  Both are int64 and ascending; `labels` are int32[N].
  """
  rng = randomness.host_rng(split_seed, randomness.Purpose.VALIDATION_SPLIT)
  quotas = proportional_quotas(np.bincount(labels), num_held_out)
  held_out = draw(labels, quotas, rng)
  left = np.setdiff1d(np.arange(len(labels)), held_out)
  rng = randomness.host_rng(0, randomness.Purpose.TRAIN_SUBSET)
  quotas = equal_quotas(np.bincount(labels[left]), num_train)
  return left[draw(labels[left], quotas, rng)], held_out


def equal_quotas(class_sizes: np.ndarray, total: int) -> np.ndarray:
  """The same quota for each class, or all images of a smaller class.

  `class_sizes` are int[C]. The quotas, int[C], sum to `total`, which must be at
  most the sum of sizes. Quotas of classes with images left differ by at most 1.
  """
  labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
  turns = np.concatenate([*map(np.arange, class_sizes)])
  chosen = np.lexsort([labels, turns])[:total]  # Turn by turn, one a class.
  return np.bincount(labels[chosen], minlength=len(class_sizes))


def proportional_quotas(class_sizes: np.ndarray, total: int) -> np.ndarray:
  """Quotas in proportion to class sizes, by largest remainders, int[C]."""
  exact = total * class_sizes / class_sizes.sum()
  quotas = np.floor(exact).astype(class_sizes.dtype)
  remainders = np.argsort(quotas - exact, kind="stable")
  quotas[remainders[: total - quotas.sum()]] += 1
  return quotas


def draw(
  labels: np.ndarray, quotas: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Draws positions of `quotas[c]` images of every class c, ascending.

  `labels` are int[N], `quotas` int[C]. With the same generator state, a smaller
  quota draws a subset of a larger quota's positions.
  """
  chosen = [
    rng.permutation(np.flatnonzero(labels == label))[:quota]
    for label, quota in enumerate(quotas)
  ]
  return np.sort(np.concatenate(chosen))
