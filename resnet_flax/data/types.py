"""What a data set is to the rest of the program."""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from ml_collections import ConfigDict

Batch = tuple[np.ndarray, np.ndarray]  # Images and labels.


class Draw(NamedTuple):
  """What the random crops of an epoch depend on."""

  seed: int  # The experiment's.
  epoch: int  # 0-based.


class Split(abc.ABC):
  """Labelled images, in a fixed order."""

  # int64[N], the images of this split, by position in the official split.
  indices: np.ndarray
  num_crops: int = 1  # Of each image, where it is scored.

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

    `order` holds int64[B] positions in this split. Splits that cut images as
    they decode them do it at random with `draw`, which is for training. Without
    they take the central part, or, if they are scored by several crops of each
    image, give uint8[B, crops, H, W, C].

    What an image looks like depends on its position and `draw` alone: of a
    batch that several processes share, each may ask for its own part.
    """

  def subset(self, positions: np.ndarray) -> Self:
    """The split of the images at the given positions of this one."""
    whole: Any = self
    return dataclasses.replace(whole, indices=self.indices[positions])

  def take(self, positions: np.ndarray) -> Batch:
    """uint8[B, H, W, C] images and int32[B] labels at these positions."""
    ((images, labels),) = self.batches([positions])
    return images, labels


@dataclasses.dataclass(frozen=True)
class ArraySplit(Split):
  """Images in memory, or memory-mapped."""

  images: np.ndarray  # uint8[M, H, W, C]
  labels: np.ndarray  # int32[M]
  indices: np.ndarray

  @property
  def image_shape(self) -> tuple[int, ...]:
    """See `Split`."""
    return self.images.shape[1:]

  def batches(
    self, order: Sequence[np.ndarray], draw: Draw | None = None
  ) -> Iterator[Batch]:
    """See `Split`."""
    for positions in order:
      rows = self.indices[positions]
      yield self.images[rows], self.labels[rows]


def whole_split(images: np.ndarray, labels: np.ndarray) -> ArraySplit:
  """The split of all the given images, uint8[N, H, W, C] and int32[N]."""
  return ArraySplit(images, labels, np.arange(len(labels)))


class Facts(NamedTuple):
  """What a run remembers of a streamed set, whatever becomes of its data."""

  class_names: tuple[str, ...]  # One for each class, '' if it is not known.
  num_train: int
  num_test: int


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """What is known of a data set without opening it."""

  num_classes: int
  image_shape: tuple[int, int, int]  # (H, W, C) of every image.
  num_train: int  # Images of the official training split.
  num_test: int
  # By `config.dataset` and this, `Arrays` of a set in memory and their source.
  read: Callable[[ConfigDict, Any], Any] = lambda config, known: None
  class_names: tuple[str, ...] = ()  # Of a streamed set, if they are known.


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set ready for training."""

  train: Split
  validation: Split | None  # Held-out part of the training images.
  test: Split
  class_names: tuple[str, ...]
  # Names the pixels, or above 1 GiB samples of them: set, version, digest.
  source: str


@dataclasses.dataclass(frozen=True)
class Arrays:
  """A source, decoded: the official splits and the labels' names."""

  train_images: np.ndarray  # uint8[N, H, W, C]
  train_labels: np.ndarray  # int32[N]
  test_images: np.ndarray
  test_labels: np.ndarray
  class_names: tuple[str, ...]
