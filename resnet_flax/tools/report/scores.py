"""What a checkpoint of a run makes of the test images."""

import dataclasses

import numpy as np

from resnet_flax.data import types

# Rows of five, as many as can be looked through.
_MOST_MISTAKES = 25


@dataclasses.dataclass(frozen=True)
class Mistakes:
  """Wrongly classified test images, the most confident first."""

  images: np.ndarray  # uint8[N, H, W, C].
  positions: np.ndarray  # int64[N], in the test split, from 0.
  labels: np.ndarray  # int32[N].
  predicted: np.ndarray  # int64[N].
  # float32[N], the probabilities of the predicted classes.
  confidences: np.ndarray

  def __len__(self) -> int:
    return len(self.positions)


@dataclasses.dataclass(frozen=True)
class Scores:
  """One checkpoint on the test split."""

  class_names: tuple[str, ...]  # Name of each label.
  # int64[classes, classes], how many images of the row's class were taken for
  # the column's.
  confusion: np.ndarray
  mistakes: Mistakes  # Some of the wrong ones, or all if they are few.
  step: int  # The training steps that the checkpoint has.

  @property
  def num_images(self) -> int:
    """Images of the test split."""
    return int(self.confusion.sum())

  @property
  def num_correct(self) -> int:
    """Those whose class was predicted."""
    return int(np.trace(self.confusion))

  def confused(self, most: int) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images), the most frequent first."""
    wrong = self.confusion.copy()
    np.fill_diagonal(wrong, 0)
    # Stable, so that of equally frequent ones the first comes first.
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = np.stack(np.unravel_index(order, wrong.shape), axis=1).tolist()
    return [(i, j, int(wrong[i, j])) for i, j in pairs if wrong[i, j]]


def summarize(
  split: types.Split,
  labels: np.ndarray,
  probabilities: np.ndarray,
  *,
  class_names: tuple[str, ...],
  step: int,
) -> Scores:
  """What predictions are worth.

  Args:
    split: of N images.
    labels: int32[N].
    probabilities: float32[N, classes].
    class_names: name of each label.
    step: the training steps of the checkpoint.
  """
  predicted = np.argmax(probabilities, axis=1)
  confidences = np.max(probabilities, axis=1)
  classes = len(class_names)
  confusion = np.zeros((classes, classes), np.int64)
  np.add.at(confusion, (labels, predicted), 1)
  wrong = np.flatnonzero(predicted != labels)
  chosen = wrong[np.argsort(-confidences[wrong], kind="stable")]
  chosen = chosen[:_MOST_MISTAKES]
  return Scores(
    class_names=class_names,
    confusion=confusion,
    mistakes=Mistakes(
      images=split.take(chosen)[0],
      positions=chosen,
      labels=labels[chosen],
      predicted=predicted[chosen],
      confidences=confidences[chosen],
    ),
    step=step,
  )
