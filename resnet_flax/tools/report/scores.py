"""What a checkpoint of a run makes of the test images."""

import dataclasses
from typing import NamedTuple

import numpy as np

from resnet_flax.data import types

# Rows of five, as many as can be looked through.
_MOST_MISTAKES = 25


class Mistake(NamedTuple):
  """A wrongly classified test image."""

  image: np.ndarray  # uint8[H, W, C].
  position: int  # In the test split, from 0.
  true: str  # Names of classes.
  predicted: str
  confidence: float  # The probability of the predicted class.


@dataclasses.dataclass(frozen=True)
class Scores:
  """One checkpoint on the test split."""

  class_names: tuple[str, ...]  # Name of each label.
  # int64[classes, classes], how many images of the row's class were taken for
  # the column's.
  confusion: np.ndarray
  mistakes: list[Mistake]  # The most confident first; all if they are few.
  step: int  # The training steps that the checkpoint has.

  @property
  def num_images(self) -> int:
    """Images of the test split."""
    return int(self.confusion.sum())

  @property
  def num_correct(self) -> int:
    """Those whose class was predicted."""
    return int(np.trace(self.confusion))

  def confused(self, most: int) -> list[tuple[str, str, int]]:
    """(true class, predicted class, images), the most frequent first."""
    wrong = self.confusion.copy()
    np.fill_diagonal(wrong, 0)
    # Stable, so that of equally frequent ones the first comes first.
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
  """What the parts of `load.Predictions` are worth."""
  names = dataset.class_names
  predicted = np.argmax(probabilities, axis=1)
  confidences = np.max(probabilities, axis=1)
  confusion = np.zeros((len(names), len(names)), np.int64)
  np.add.at(confusion, (labels, predicted), 1)
  wrong = np.flatnonzero(predicted != labels)
  order = np.argsort(-confidences[wrong], kind="stable")
  chosen = wrong[order[:_MOST_MISTAKES]]
  mistakes = [
    Mistake(
      image,
      int(position),
      names[labels[position]],
      names[predicted[position]],
      float(confidences[position]),
    )
    for image, position in zip(
      dataset.test.take(chosen)[0], chosen, strict=True
    )
  ]
  return Scores(names, confusion, mistakes, step)
