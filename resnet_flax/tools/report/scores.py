"""What the best checkpoint of a run makes of the test images."""

import dataclasses

import numpy as np

from resnet_flax import data as datasets
from resnet_flax.run import errors, load as inference, rules
from resnet_flax.tools.report import runs as runs_lib

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


def score(run: runs_lib.Run, seed: int) -> Scores:
  """Scores a seed's best checkpoint on the test split of its data set.

  Raises:
    ConfigError: its configuration is of another version, or its network is
      not for these classes.
    DataError: the data cannot be had, or is not what the run was trained on.
    WorkdirError: there is no checkpoint, or none that can be read.
  """
  # Before the data, which takes longer.
  loaded = inference.load_model(run.folder, seed=seed)
  rules.check_labels(loaded.config)
  dataset = datasets.load(loaded.config.dataset)
  if run.data is not None and run.data != dataset.source:
    raise errors.DataError(
      f"{run.name} was trained on {run.data}, but the data here is"
      f" {dataset.source}. Set TFDS_DATA_DIR to the folder of the former."
    )
  size = loaded.config.eval_batch_size
  everything = np.arange(len(dataset.test))
  order = [everything[start : start + size] for start in everything[::size]]
  scored = [
    (_predict(loaded, images), labels)
    for images, labels in dataset.test.batches(order)
  ]
  probabilities, labels = map(np.concatenate, zip(*scored, strict=True))
  return summarize(
    dataset.test,
    labels,
    probabilities,
    class_names=dataset.class_names,
    step=loaded.step,
  )


def _predict(loaded: inference.LoadedModel, images: np.ndarray) -> np.ndarray:
  """Probabilities, means over the crops of an image where it has several."""
  crops = images.reshape(-1, *images.shape[-3:])
  probabilities = loaded.predict(crops)
  return probabilities.reshape(len(images), -1, probabilities.shape[-1]).mean(
    axis=1
  )


def summarize(
  split: datasets.Split,
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
