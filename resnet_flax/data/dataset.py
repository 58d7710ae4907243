"""Data sets by name: facts about every set, and one `load` for all sets."""

import dataclasses

from ml_collections import ConfigDict

from resnet_flax.data import cifar, digits, prepared, splits, streaming, types
from resnet_flax.run import errors

# Sets that are held in memory.
DATASETS = {
  "cifar10": types.DatasetInfo(10, (32, 32, 3), 50_000, 10_000, cifar.load),
  "cifar100": types.DatasetInfo(100, (32, 32, 3), 50_000, 10_000, cifar.load),
  "digits": types.DatasetInfo(
    10, (32, 32, 3), 1_437, 360, lambda *_: (digits.read(), "digits")
  ),
}

NAMES = (*DATASETS, *streaming.KNOWN, streaming.FOLDER)


def info(
  config: ConfigDict, facts: types.Facts | None = None
) -> types.DatasetInfo:
  """Facts about the set that `config.dataset` names, without opening it.

  `facts`, which a run stores, replace a streamed set's files. A streamed set
  with neither raises `DataError`, unless `streaming.KNOWN` has its facts; a
  folder without `data_dir` raises `ConfigError`.
  """
  if config.name in DATASETS:
    return DATASETS[config.name]
  if streaming.is_streamed(config.name):
    return streaming.info(config, facts)
  names = [*NAMES, f"{prepared.PREFIX}NAME"]
  raise errors.unknown_name("dataset.name", config.name, names)


def num_train_examples(
  config: ConfigDict, facts: types.Facts | None = None
) -> int:
  """The number of images to train on; `ConfigError` if there are too few."""
  num_images = info(config, facts).num_train
  num_left = num_images - config.validation_examples
  if num_left <= 0:
    raise errors.ConfigError(
      f"dataset.validation_examples={config.validation_examples} leaves no"
      f" training image: {config.name} has {num_images}."
    )
  if config.train_examples > num_left:
    raise errors.ConfigError(
      f"dataset.train_examples={config.train_examples} is more than the"
      f" {num_left} training images that {config.name} has"
      + (" after validation_examples." if config.validation_examples else ".")
    )
  return config.train_examples or num_left


def load(config: ConfigDict, augmentation: str = "none") -> types.Dataset:
  """Opens the set that `config.dataset` names; prepares CIFAR if missing.

  `augmentation` is `augment.name`. `validation_examples` are held out and
  `train_examples` are kept; both are drawn by class, but not from TFDS streams,
  whose labels are unknown before they are read.

  Raises:
    ConfigError: an unknown set, too few images, or a missing extra.
    DataError: the data is missing, damaged or of another form.
  """
  num_train = num_train_examples(config)
  if streaming.is_streamed(config.name):
    dataset, labels = streaming.load(config, augmentation)
  else:
    known = DATASETS[config.name]
    arrays, source = known.read(config, known)
    labels = arrays["train_labels"]
    whole, test = (
      types.whole_split(
        arrays[f"{name}_images"], arrays[f"{name}_labels"], config.test_crops
      )
      for name in ("train", "test")
    )
    class_names = tuple(map(str, arrays["class_names"]))
    dataset = types.Dataset(whole, None, test, class_names, source)
  train, num_held_out = dataset.train, config.validation_examples
  train_positions, held_out = splits.choose(
    labels, num_train, num_held_out, config.split_seed
  )
  if len(held_out):
    dataset = dataclasses.replace(dataset, validation=train.subset(held_out))
  if len(train_positions) < len(train):
    dataset = dataclasses.replace(dataset, train=train.subset(train_positions))
  return streaming.settle(dataset)  # May decode streams now, into memory.
