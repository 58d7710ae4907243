"""The types of data sets, splits and batches."""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from ml_collections import ConfigDict

Batch = tuple[np.ndarray, np.ndarray]  # Images and labels.
# The decoded official splits of a set: `train_images`, uint8[N, H, W, C],
# `train_labels`, int32[N], `test_images`, `test_labels`, `class_names`, str[C].
Arrays = dict[str, np.ndarray]


class Draw(NamedTuple):
  """Seed and epoch, which decide the random crops of an epoch."""

  seed: int  # The experiment's seed.
  epoch: int  # 0-based.


@dataclasses.dataclass(frozen=True)
class Split(abc.ABC):
  """Labelled images, in a fixed order."""

  # int64[N]: the positions of this split's images in the official split.
  indices: np.ndarray
  # Crops of a scored image: 1; 2 (the image and its mirror image); 10 (only if
  # images are decoded while training).
  num_crops: int = dataclasses.field(default=1, kw_only=True)

  def __len__(self) -> int:
    return len(self.indices)

  @property
  @abc.abstractmethod
  def image_shape(self) -> tuple[int, ...]:
    """(H, W, C) of every image."""

  @abc.abstractmethod
  def batches(
    self, order: Sequence[np.ndarray], draw: Draw | None = None
  ) -> Iterator[Batch]:
    """Yields uint8[B, H, W, C] images and int32[B] labels of each batch.

    `order` holds int64[B] positions in this split. Training passes `draw`: then
    each image has one crop, a random crop if the split crops at random. Without
    `draw`, each image has `num_crops` crops; more than 1 make the images
    uint8[B, crops, H, W, C].

    An image's pixels depend only on its position and `draw`, so each process
    may ask for its own part of a batch.
    """

  def subset(self, positions: np.ndarray) -> Self:
    """The part of this split at the given positions."""
    return dataclasses.replace(self, indices=self.indices[positions])

  def one_crop(self) -> Self:
    """The same images, with one crop of each."""
    return dataclasses.replace(self, num_crops=1)

  def take(self, positions: np.ndarray) -> Batch:
    """uint8[B, H, W, C] images, one crop of each, and int32[B] labels."""
    ((images, labels),) = self.one_crop().batches([positions])
    return images, labels


@dataclasses.dataclass(frozen=True)
class ArraySplit(Split):
  """Images in memory, or memory-mapped; `images[k]` has index `indices[k]`."""

  images: np.ndarray  # uint8[N, H, W, C]
  labels: np.ndarray  # int32[N]

  @property
  def image_shape(self) -> tuple[int, ...]:
    """See `Split`."""
    return self.images.shape[1:]

  def batches(
    self, order: Sequence[np.ndarray], draw: Draw | None = None
  ) -> Iterator[Batch]:
    """See `Split`."""
    for positions in order:
      images = self.images[positions]
      if self.num_crops > 1 and draw is None:
        images = np.stack([images, images[:, :, ::-1]], axis=1)
      yield images, self.labels[positions]

  def subset(self, positions: np.ndarray) -> Self:
    """See `Split`; copies images and labels."""
    images, labels = self.images[positions], self.labels[positions]
    subset = super().subset(positions)
    return dataclasses.replace(subset, images=images, labels=labels)


def whole_split(
  images: np.ndarray, labels: np.ndarray, num_crops: int = 1
) -> ArraySplit:
  """The split of all the given images, uint8[N, H, W, C] and int32[N]."""
  indices = np.arange(len(labels))
  return ArraySplit(indices, images, labels, num_crops=num_crops)


class Facts(NamedTuple):
  """Facts about a streamed set; a run stores them for use without the data."""

  class_names: tuple[str, ...]  # One for each class, '' if it is not known.
  num_train: int
  num_test: int


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """Facts about a data set that are known without opening it."""

  num_classes: int
  image_shape: tuple[int, int, int]  # (H, W, C) of every image.
  num_train: int  # Images of the official training split.
  num_test: int
  # Maps `config.dataset` and this object to `Arrays` and their source: a name
  # with a digest of the files, by which a resumed run detects other data.
  read: Callable[[ConfigDict, Any], Any] = lambda config, known: None
  class_names: tuple[str, ...] = ()  # Only for streamed sets, if known.


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set ready for training."""

  train: Split
  validation: Split | None  # Held-out training images, or a folder's val/.
  test: Split
  class_names: tuple[str, ...]
  # Name and, where the set has them, version and digest of its files.
  source: str
