"""One `load` for every data set, and what is known of each beforehand."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from resnet_flax import errors, randomness
from resnet_flax.datasets import cache, cifar, digits, record, splits


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """What is known of a data set without opening it.

  Attributes:
    num_classes: number of labels.
    image_shape: (H, W, C) of every image.
    num_train: images of the official training split.
    num_test: images of the official test split.
  """

  num_classes: int
  image_shape: tuple[int, int, int]
  num_train: int
  num_test: int


DATASETS = {
  "cifar10": DatasetInfo(10, (32, 32, 3), 50_000, 10_000),
  "cifar100": DatasetInfo(100, (32, 32, 3), 50_000, 10_000),
  "digits": DatasetInfo(10, (32, 32, 3), 1_437, 360),
}


def num_train_examples(config: ConfigDict) -> int:
  """How many images an experiment trains on.

  Args:
    config: the `dataset` part of the configuration.

  Raises:
    ConfigError: an unknown data set, or parts larger than the whole.
  """
  if config.name not in DATASETS:
    raise errors.unknown_name("dataset.name", config.name, DATASETS)
  info = DATASETS[config.name]
  rest = info.num_train - config.validation_examples
  if rest <= 0:
    raise errors.ConfigError(
      f"dataset.validation_examples={config.validation_examples} leaves no"
      f" training image: {config.name} has {info.num_train}."
    )
  if config.train_examples > rest:
    raise errors.ConfigError(
      f"dataset.train_examples={config.train_examples} is more than the"
      f" {rest} training images that {config.name} has"
      + (" after validation_examples." if config.validation_examples else ".")
    )
  return config.train_examples or rest


def load(config: ConfigDict) -> record.Dataset:
  """Opens a data set, preparing and caching it if need be.

  Args:
    config: the `dataset` part of the configuration.

  Returns:
    The data set with its validation part held out and the training part cut
    to `train_examples`.

  Raises:
    ConfigError: see `num_train_examples`.
    DataError: the data cannot be had or is not what it should be.
  """
  num_train = num_train_examples(config)
  info = DATASETS[config.name]
  arrays, source = _read(config)
  record.check(arrays, source, info.image_shape)
  if len(arrays.class_names) != info.num_classes:
    raise errors.DataError(
      f"{source} has {len(arrays.class_names)} classes; needed:"
      f" {info.num_classes}."
    )
  counts = len(arrays.train_labels), len(arrays.test_labels)
  if counts != (info.num_train, info.num_test):
    raise errors.DataError(
      f"{source} has {counts[0]} training and {counts[1]} test images; needed:"
      f" {info.num_train} and {info.num_test}."
    )
  train = record.whole_split(arrays.train_images, arrays.train_labels)
  validation = None
  if config.validation_examples:
    validation, train = _hold_out(
      train, config.validation_examples, config.split_seed
    )
  if num_train < len(train):
    labels = train.labels[train.indices]
    rng = randomness.host_rng(0, randomness.Purpose.TRAIN_SUBSET)
    quotas = splits.equal_quotas(np.bincount(labels), num_train)
    train = train.subset(splits.draw(labels, quotas, rng))
  return record.Dataset(
    train=train,
    validation=validation,
    test=record.whole_split(arrays.test_images, arrays.test_labels),
    class_names=arrays.class_names,
    source=source,
  )


def _read(config: ConfigDict) -> tuple[record.Arrays, str]:
  if config.name == "digits":
    return digits.read(), "digits"
  root = cifar.data_dir(config.data_dir)
  folder = cifar.find_prepared(config.name, root)
  if folder is None:
    folder = cifar.prepare(config.name, root, config.archive)
  info = DATASETS[config.name]
  counts = {"train": info.num_train, "test": info.num_test}
  key = f"{config.name}-{folder.name}-{cifar.fingerprint(folder)[:16]}"
  folder_of_cache = cache.cache_dir(config.cache_dir)
  arrays = cache.cached(
    folder_of_cache, key, lambda: cifar.read(folder, counts)
  )
  return arrays, key


def _hold_out(
  split: record.Split, count: int, seed: int
) -> tuple[record.Split, record.Split]:
  labels = split.labels[split.indices]
  rng = randomness.host_rng(seed, randomness.Purpose.VALIDATION_SPLIT)
  quotas = splits.proportional_quotas(np.bincount(labels), count)
  held_out = splits.draw(labels, quotas, rng)
  rest = np.setdiff1d(np.arange(len(split)), held_out)
  return split.subset(held_out), split.subset(rest)
