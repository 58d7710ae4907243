"""Choosing parts of a split: fixed, class-balanced or stratified."""

import numpy as np

from resnet_flax.data import randomness


def choose(
  size: int,
  labels: np.ndarray | None,
  num_train: int,
  num_held_out: int,
  split_seed: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Which images of a training split are trained on, and which held out.

  With int32[size] labels, the held-out part is stratified and the other one
  class-balanced; without, both are drawn from all images alike.

  Returns:
    int64[num_train] and int64[num_held_out] positions, ascending.
  """
  order = np.arange(size)
  rng = randomness.host_rng(split_seed, randomness.Purpose.VALIDATION_SPLIT)
  held_out = order[:0]
  if num_held_out and labels is None:
    held_out = np.sort(rng.permutation(size)[:num_held_out])
  elif num_held_out and labels is not None:
    quotas = proportional_quotas(np.bincount(labels), num_held_out)
    held_out = draw(labels, quotas, rng)
  kept = np.setdiff1d(order, held_out)
  rng = randomness.host_rng(0, randomness.Purpose.TRAIN_SUBSET)
  if num_train < len(kept) and labels is None:
    kept = kept[np.sort(rng.permutation(len(kept))[:num_train])]
  elif num_train < len(kept) and labels is not None:
    quotas = equal_quotas(np.bincount(labels[kept]), num_train)
    kept = kept[draw(labels[kept], quotas, rng)]
  return kept, held_out


def equal_quotas(class_sizes: np.ndarray, total: int) -> np.ndarray:
  """As many images from each class, as far as the classes last.

  Args:
    class_sizes: int[C], images that each class has.
    total: images wanted, at most the sum of `class_sizes`.

  Returns:
    int[C] that sums to `total`. Quotas differ by at most one, except that a
    class which is smaller than its quota gives all it has.
  """
  quotas = np.zeros_like(class_sizes)
  while (missing := total - quotas.sum()) > 0:
    room = np.flatnonzero(quotas < class_sizes)
    share = max(missing // len(room), 1)
    room = room[:missing]
    quotas[room] += np.minimum(share, class_sizes[room] - quotas[room])
  return quotas


def proportional_quotas(class_sizes: np.ndarray, total: int) -> np.ndarray:
  """From each class its share, by the method of largest remainders.

  Args:
    class_sizes: int[C], images that each class has.
    total: images wanted, at most the sum of `class_sizes`.

  Returns:
    int[C] that sums to `total`.
  """
  exact = total * class_sizes / class_sizes.sum()
  quotas = np.floor(exact).astype(class_sizes.dtype)
  remainders = np.argsort(quotas - exact, kind="stable")
  quotas[remainders[: total - quotas.sum()]] += 1
  return quotas


def draw(
  labels: np.ndarray, quotas: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Positions of `quotas[c]` images of every class c, in ascending order.

  With the same generator state a smaller quota draws a subset of what a
  larger one draws.

  Args:
    labels: int[N].
    quotas: int[C].
    rng: draws one permutation for each class.
  """
  chosen = [
    rng.permutation(np.flatnonzero(labels == label))[:quota]
    for label, quota in enumerate(quotas)
  ]
  return np.sort(np.concatenate(chosen))
