"""What a data set is to the rest of the program."""

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from resnet_flax.run import errors


class Draw(NamedTuple):
  """What the random crops of an epoch depend on.

  Attributes:
    seed: the experiment's.
    epoch: 0-based.
  """

  seed: int
  epoch: int


class Split(abc.ABC):
  """Labelled images, in a fixed order.

  Attributes:
    indices: int64[N], the images of this split, by position in the official
      split.
    num_crops: of each image, where it is scored.
  """

  indices: np.ndarray
  num_crops: int = 1

  def __len__(self) -> int:
    return len(self.indices)

  @property
  @abc.abstractmethod
  def image_shape(self) -> tuple[int, ...]:
    """(H, W, C) of every image."""

  @abc.abstractmethod
  def batches(
    self, order: Sequence[np.ndarray], draw: Draw | None = None
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reads one batch after the other.

    What an image looks like depends on its position and `draw` alone: of a
    batch that several processes share, each may ask for its own part.

    Args:
      order: for each batch int64[B], positions in this split.
      draw: for training; splits that cut images as they decode them do it at
        random then. None: the central part.

    Yields:
      uint8[B, H, W, C] images and int32[B] labels. A split that is scored by
      several crops of each image gives uint8[B, crops, H, W, C] without `draw`.
    """

  @abc.abstractmethod
  def subset(self, positions: np.ndarray) -> "Split":
    """The split of the images at the given positions of this one."""

  def take(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8[B, H, W, C] images and int32[B] labels at these positions."""
    ((images, labels),) = self.batches([positions])
    return images, labels


@dataclasses.dataclass(frozen=True)
class ArraySplit(Split):
  """Images in memory, or memory-mapped.

  Attributes:
    images: uint8[M, H, W, C], may be memory-mapped.
    labels: int32[M].
    indices: int64[N], the images of this split, by position in `images`.
  """

  images: np.ndarray
  labels: np.ndarray
  indices: np.ndarray

  @property
  def image_shape(self) -> tuple[int, ...]:
    """See `Split`."""
    return self.images.shape[1:]

  def batches(
    self, order: Sequence[np.ndarray], draw: Draw | None = None
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """See `Split`."""
    del draw
    for positions in order:
      rows = self.indices[positions]
      yield self.images[rows], self.labels[rows]

  def subset(self, positions: np.ndarray) -> "ArraySplit":
    """See `Split`."""
    return dataclasses.replace(self, indices=self.indices[positions])


def whole_split(images: np.ndarray, labels: np.ndarray) -> ArraySplit:
  """The split of all the given images, uint8[N, H, W, C] and int32[N]."""
  return ArraySplit(images, labels, np.arange(len(labels)))


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set ready for training.

  Attributes:
    train: what is trained on.
    validation: held-out part of the training images, or None.
    test: the official test split.
    class_names: name of each label.
    source: names the pixels exactly: data set, version, and fingerprint of
      the copy that they come from.
  """

  train: Split
  validation: Split | None
  test: Split
  class_names: tuple[str, ...]
  source: str


@dataclasses.dataclass(frozen=True)
class Arrays:
  """A source, decoded: the official splits and the labels' names.

  Attributes:
    train_images, test_images: uint8[N, H, W, C].
    train_labels, test_labels: int32[N].
    class_names: name of each label.
  """

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  class_names: tuple[str, ...]


def check(arrays: Arrays, name: str, image_shape: tuple[int, ...]) -> None:
  """Checks that arrays have the form that the program relies on.

  Args:
    arrays: what a source gave.
    name: of the data set, for messages.
    image_shape: (H, W, C) that every image must have.

  Raises:
    DataError: an empty split, a wrong shape or dtype, or a label out of range.
  """
  for split in ("train", "test"):
    images = getattr(arrays, f"{split}_images")
    labels = getattr(arrays, f"{split}_labels")
    where = f"{name}: the {split} split"
    if labels.ndim != 1 or labels.dtype != np.int32:
      raise errors.DataError(
        f"{where} has labels of {labels.dtype}{list(labels.shape)}; needed:"
        " int32[N]."
      )
    if len(labels) == 0:
      raise errors.DataError(f"{where} is empty.")
    if images.shape != (len(labels), *image_shape) or images.dtype != np.uint8:
      raise errors.DataError(
        f"{where} has {len(labels)} labels and images of {images.dtype}"
        f"{list(images.shape)}; needed: uint8{[len(labels), *image_shape]}."
      )
    low, high = labels.min(), labels.max()
    if low < 0 or high >= len(arrays.class_names):
      raise errors.DataError(
        f"{where} has labels from {low} to {high}; needed: 0 to"
        f" {len(arrays.class_names) - 1}."
      )
