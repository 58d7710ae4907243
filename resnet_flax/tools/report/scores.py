"""Scores of a run's checkpoint on the test images."""

from typing import NamedTuple

import numpy as np

from resnet_flax.data import types

# Five rows of five, which a reader can look through.
_MOST_MISTAKES = 25


class Mistake(NamedTuple):
  """A wrongly classified test image."""

  image: np.ndarray  # uint8[H, W, C].
  position: int  # Its index in the test split, from 0.
  true: str  # Name of the true class.
  predicted: str  # Name of the predicted class.
  confidence: float  # The probability of the predicted class.


class Scores(NamedTuple):
  """The scores of one checkpoint on the test split."""

  class_names: tuple[str, ...]  # Name of each label.
  # int64[classes, classes]: how many images of the row's class were predicted
  # as the column's class.
  confusion: np.ndarray
  mistakes: list[Mistake]  # At most 25, the most confident ones first.
  step: int  # The checkpoint's training step.

  def confused(self, most: int) -> list[tuple[str, str, int]]:
    """The `most` frequent confusions: (true class, predicted class, images)."""
    wrong = self.confusion.copy()
    np.fill_diagonal(wrong, 0)
    # Stable, so that equally frequent pairs keep their order.
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    names = self.class_names
    return [
      (names[i], names[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j]
    ]


def summarize(
  dataset: types.Dataset,
  labels: np.ndarray,
  probabilities: np.ndarray,
  step: int,
) -> Scores:
  """Computes the scores from the fields of `load.Predictions`."""
  names = dataset.class_names
  predicted = np.argmax(probabilities, axis=1)
  confidences = np.max(probabilities, axis=1)
  confusion = np.zeros((len(names), len(names)), np.int64)
  np.add.at(confusion, (labels, predicted), 1)
  wrong = np.flatnonzero(predicted != labels)
  order = np.argsort(-confidences[wrong], kind="stable")
  chosen = wrong[order[:_MOST_MISTAKES]]
  images, _ = dataset.test.take(chosen)
  mistakes = [
    Mistake(image, int(k), names[true], names[guess], float(confidence))
    for image, k, true, guess, confidence in zip(
      images,
      *(chosen, labels[chosen], predicted[chosen], confidences[chosen]),
      strict=True,
    )
  ]
  return Scores(names, confusion, mistakes, step)
