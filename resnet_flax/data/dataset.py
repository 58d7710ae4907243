"""Data sets by name: what is known of each, and one `load` for all."""

import dataclasses
from collections.abc import Callable

from ml_collections import ConfigDict

from resnet_flax.data import (
  cache,
  cifar,
  digits,
  prepared,
  splits,
  streaming,
  types,
)
from resnet_flax.run import errors


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """What is known of a data set without opening it."""

  num_classes: int
  image_shape: tuple[int, int, int]  # (H, W, C) of every image.
  num_train: int  # Images of the official training split.
  num_test: int
  # Of a set in memory, by the `dataset` configuration: arrays and their source.
  read: Callable[[ConfigDict], tuple[types.Arrays, str]] | None = None


def _read_cifar(config: ConfigDict) -> tuple[types.Arrays, str]:
  root = prepared.data_dir(config.data_dir)
  folder = prepared.find(config.name, root)
  if folder is None:
    folder = cifar.prepare(config.name, root, config.archive)
  known = DATASETS[config.name]
  counts = {"train": known.num_train, "test": known.num_test}
  digest = prepared.fingerprint(folder, read_all=True)
  key = f"{config.name}-{folder.name}-{digest[:16]}"
  cache_dir = cache.cache_dir(config.cache_dir)
  return cache.cached(cache_dir, key, lambda: cifar.read(folder, counts)), key


# Sets that are held in memory.
DATASETS = {
  "cifar10": DatasetInfo(10, (32, 32, 3), 50_000, 10_000, _read_cifar),
  "cifar100": DatasetInfo(100, (32, 32, 3), 50_000, 10_000, _read_cifar),
  "digits": DatasetInfo(
    10, (32, 32, 3), 1_437, 360, lambda config: (digits.read(), "digits")
  ),
}

# Read while training. Classes, training and test images are known, so that a
# network can be looked at and loaded where there is no copy.
_STREAMED = {"imagenet2012": (1000, 1_281_167, 50_000)}

NAMES = (*DATASETS, *_STREAMED)


def remember(name: str, classes: int, num_train: int, num_test: int) -> None:
  """Lets `info` know a set that is read while training without its copy."""
  if name.startswith(streaming.PREFIX):
    _STREAMED[name] = classes, num_train, num_test


def is_streamed(name: str) -> bool:
  """Whether a data set is decoded while training."""
  return name in _STREAMED or name.startswith(streaming.PREFIX)


def info(config: ConfigDict) -> DatasetInfo:
  """What is known of the set that `config.dataset` names, without opening it.

  Raises:
    ConfigError: an unknown data set.
    DataError: only its prepared copy can tell, and there is none.
  """
  if config.name in DATASETS:
    return DATASETS[config.name]
  if not is_streamed(config.name):
    names = [*NAMES, f"{streaming.PREFIX}NAME"]
    raise errors.unknown_name("dataset.name", config.name, names)
  shape = (config.image_size, config.image_size, 3)
  try:
    facts = streaming.read_facts(streaming.find(config.name, config.data_dir))
    known = len(facts.class_names), facts.num_train, facts.num_test
  except errors.DataError:
    # `load` says what is wrong with the copy.
    if config.name not in _STREAMED:
      raise
    known = _STREAMED[config.name]
  return DatasetInfo(known[0], shape, *known[1:])


def num_train_examples(config: ConfigDict) -> int:
  """How many images an experiment with this `config.dataset` trains on.

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


def load(config: ConfigDict, augmentation: str = "none") -> types.Dataset:
  """Opens the set that `config.dataset` names, preparing it if need be.

  The validation part is held out, the training part cut to `train_examples`;
  class-balanced but for streamed sets, whose labels are not known before they
  are read.

  Raises:
    ConfigError: see `num_train_examples`.
    DataError: the data cannot be had, or is damaged or of another form.
  """
  num_train = num_train_examples(config)
  if is_streamed(config.name):
    dataset, labels = streaming.load(config, augmentation), None
  else:
    known = DATASETS[config.name]
    assert known.read is not None
    arrays, source = known.read(config)
    check_arrays(arrays, known, source)
    labels = arrays.train_labels
    dataset = types.Dataset(
      train=types.whole_split(arrays.train_images, labels),
      validation=None,
      test=types.whole_split(arrays.test_images, arrays.test_labels),
      class_names=arrays.class_names,
      source=source,
    )
  train, num_held_out = dataset.train, config.validation_examples
  kept, held_out = splits.choose(
    len(train), labels, num_train, num_held_out, config.split_seed
  )
  validation = train.subset(held_out) if len(held_out) else None
  return dataclasses.replace(
    dataset,
    train=streaming.settle(train.subset(kept), is_scored=False),
    validation=validation and streaming.settle(validation, is_scored=True),
    test=streaming.settle(dataset.test, is_scored=True),
  )


def check_arrays(arrays: types.Arrays, known: DatasetInfo, source: str) -> None:
  """Raises `DataError` for a wrong shape or dtype, or a label out of range."""
  classes = len(arrays.class_names)
  if classes != (must := known.num_classes):
    message = f"{source} has {classes} classes; it must have {must}."
    raise errors.DataError(message)
  for split, count in (("train", known.num_train), ("test", known.num_test)):
    for kind, dtype, form in (
      ("images", "uint8", (count, *known.image_shape)),
      ("labels", "int32", (count,)),
    ):
      array = getattr(arrays, f"{split}_{kind}")
      if array.shape != form or array.dtype != dtype:
        raise errors.DataError(
          f"{source}: the {split} {kind} are {array.dtype}{list(array.shape)};"
          f" they must be {dtype}{list(form)}."
        )
    if array.min() < 0 or array.max() >= classes:
      raise errors.DataError(
        f"{source}: the {split} labels are from {array.min()} to"
        f" {array.max()}; they must be from 0 to {classes - 1}."
      )
