"""One `load` for every data set, and what is known of each beforehand."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from resnet_flax.data import (
  cache,
  cifar,
  dataset as record,
  digits,
  prepared,
  randomness,
  splits,
  streaming,
)
from resnet_flax.run import errors


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


# Larger than memory: read while training. What is known without a copy of it,
# so that a network can be looked at and loaded where there is none.
_STREAMED = {"imagenet2012": (1000, 1_281_167, 50_000)}

NAMES = (*DATASETS, *_STREAMED)


def is_streamed(name: str) -> bool:
  """Whether a data set is decoded while training."""
  return name in _STREAMED or name.startswith(streaming.PREFIX)


def info(config: ConfigDict) -> DatasetInfo:
  """What is known of a data set without opening it.

  Args:
    config: the `dataset` part of the configuration.

  Raises:
    ConfigError: an unknown data set.
    DataError: only its prepared copy can tell, and there is none.
  """
  if config.name in DATASETS:
    return DATASETS[config.name]
  if not is_streamed(config.name):
    raise errors.unknown_name("dataset.name", config.name, NAMES)
  shape = (config.image_size, config.image_size, 3)
  try:
    facts = streaming.read_facts(streaming.find(config.name, config.data_dir))
  except errors.DataError:
    # `load` says what is wrong with the copy.
    if config.name not in _STREAMED:
      raise
    classes, num_train, num_test = _STREAMED[config.name]
    return DatasetInfo(classes, shape, num_train, num_test)
  return DatasetInfo(
    len(facts.class_names), shape, facts.num_train, facts.num_test
  )


def num_train_examples(config: ConfigDict) -> int:
  """How many images an experiment trains on.

  Args:
    config: the `dataset` part of the configuration.

  Raises:
    ConfigError: an unknown data set, or parts larger than the whole.
    DataError: see `info`.
  """
  whole = info(config).num_train
  rest = whole - config.validation_examples
  if rest <= 0:
    raise errors.ConfigError(
      f"dataset.validation_examples={config.validation_examples} leaves no"
      f" training image: {config.name} has {whole}."
    )
  if config.train_examples > rest:
    raise errors.ConfigError(
      f"dataset.train_examples={config.train_examples} is more than the"
      f" {rest} training images that {config.name} has"
      + (" after validation_examples." if config.validation_examples else ".")
    )
  return config.train_examples or rest


def load(config: ConfigDict, augmentation: str = "none") -> record.Dataset:
  """Opens a data set, preparing and caching it if need be.

  Args:
    config: the `dataset` part of the configuration.
    augmentation: `augment.name`, if it is to be trained on.

  Returns:
    The data set with its validation part held out and the training part cut
    to `train_examples`; class-balanced but for streamed sets, whose labels
    are not known before they are read.

  Raises:
    ConfigError: see `num_train_examples`.
    DataError: the data cannot be had or is not what it should be.
  """
  num_train = num_train_examples(config)
  if is_streamed(config.name):
    return _cut(streaming.load(config, augmentation), config, num_train)
  known = DATASETS[config.name]
  arrays, source = _read(config)
  record.check(arrays, source, known.image_shape)
  if len(arrays.class_names) != known.num_classes:
    raise errors.DataError(
      f"{source} has {len(arrays.class_names)} classes; needed:"
      f" {known.num_classes}."
    )
  counts = len(arrays.train_labels), len(arrays.test_labels)
  if counts != (known.num_train, known.num_test):
    raise errors.DataError(
      f"{source} has {counts[0]} training and {counts[1]} test images; needed:"
      f" {known.num_train} and {known.num_test}."
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


def _cut(
  dataset: record.Dataset, config: ConfigDict, num_train: int
) -> record.Dataset:
  """Parts of a streamed set, drawn without regard to labels."""
  train, validation = dataset.train, None
  if config.validation_examples:
    order = randomness.host_rng(
      config.split_seed, randomness.Purpose.VALIDATION_SPLIT
    ).permutation(len(train))
    held_out, rest = np.split(order, [config.validation_examples])
    validation = train.subset(np.sort(held_out))
    train = train.subset(np.sort(rest))
  if num_train < len(train):
    order = randomness.host_rng(0, randomness.Purpose.TRAIN_SUBSET).permutation(
      len(train)
    )
    train = train.subset(np.sort(order[:num_train]))
  return dataclasses.replace(dataset, train=train, validation=validation)


def _read(config: ConfigDict) -> tuple[record.Arrays, str]:
  if config.name == "digits":
    return digits.read(), "digits"
  root = prepared.data_dir(config.data_dir)
  folder = prepared.find(config.name, root)
  if folder is None:
    folder = cifar.prepare(config.name, root, config.archive)
  known = DATASETS[config.name]
  counts = {"train": known.num_train, "test": known.num_test}
  key = f"{config.name}-{folder.name}-{cifar.fingerprint(folder)[:16]}"
  folder_of_cache = cache.cache_dir(config.cache_dir)
  arrays = cache.cached(
    folder_of_cache, key, lambda: cifar.read(folder, counts)
  )
  return arrays, key


def _hold_out(
  split: record.ArraySplit, count: int, seed: int
) -> tuple[record.ArraySplit, record.ArraySplit]:
  labels = split.labels[split.indices]
  rng = randomness.host_rng(seed, randomness.Purpose.VALIDATION_SPLIT)
  quotas = splits.proportional_quotas(np.bincount(labels), count)
  held_out = splits.draw(labels, quotas, rng)
  rest = np.setdiff1d(np.arange(len(split)), held_out)
  return split.subset(held_out), split.subset(rest)
