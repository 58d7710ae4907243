import dataclasses

import numpy as np
import pytest

from configs import base
from resnet_flax.data import dataset as dataset_lib, digits, types
from resnet_flax.run import errors


def test_subset_of_a_subset(arrays):
  split = types.whole_split(arrays["train_images"], arrays["train_labels"])
  part = split.subset(np.array([1, 3, 5])).subset(np.array([2, 0]))
  images, labels = part.take(np.array([0, 1]))
  assert len(part) == 2
  np.testing.assert_array_equal(labels, [5, 1])
  np.testing.assert_array_equal(images, arrays["train_images"][[5, 1]])


KNOWN = types.DatasetInfo(6, (32, 32, 3), 6, 3)


def test_a_new_set_in_memory_is_one_entry(arrays, monkeypatch):
  known = dataclasses.replace(KNOWN, read=lambda *_: (arrays, "mine-1"))
  monkeypatch.setitem(dataset_lib.DATASETS, "mine", known)
  config = base.get_config().dataset
  config.name, config.validation_examples = "mine", 2
  dataset = dataset_lib.load(config)
  sizes = len(dataset.train), len(dataset.validation), len(dataset.test)
  assert sizes == (4, 2, 3)
  assert dataset.source == "mine-1"


# ---- Loading


@pytest.fixture
def config():
  config = base.get_config().dataset
  config.name = "digits"
  return config


def rows(split):
  return set(split.indices)


def test_digits_are_what_is_announced(config):
  dataset = dataset_lib.load(config)
  info = dataset_lib.DATASETS["digits"]
  assert len(dataset.train) == info.num_train
  assert len(dataset.test) == 360
  assert dataset.validation is None
  assert dataset.class_names == tuple("0123456789")
  images, _ = dataset.train.take(np.arange(10))
  assert images.dtype == np.uint8
  assert images.shape[1:] == info.image_shape
  # Stratified: every class has its fifth.
  counts = np.bincount(dataset.test.labels)
  assert (np.abs(counts - 36) <= 1).all()


def test_digits_are_enlarged_in_place(config):
  from sklearn.datasets import load_digits

  arrays = digits.read()
  small = load_digits().images
  averaged = arrays["test_images"][..., 0].reshape(-1, 8, 4, 8, 4).mean((2, 4))
  matched = np.abs(averaged[0] - small * 255 / 16).mean((1, 2)).min()
  assert matched < 20


def test_validation_is_held_out(config):
  whole = dataset_lib.load(config).train
  config.validation_examples = 200
  dataset = dataset_lib.load(config)
  assert len(dataset.validation) == 200
  assert len(dataset.train) == 1_437 - 200
  assert not rows(dataset.train) & rows(dataset.validation)
  labels = dataset.validation.take(np.arange(200))[1]
  expected = np.bincount(whole.labels) * 200 / 1_437
  assert (np.abs(np.bincount(labels) - expected) < 1).all()
  again = dataset_lib.load(config)
  assert rows(again.validation) == rows(dataset.validation)
  config.split_seed = 1
  assert rows(dataset_lib.load(config).validation) != rows(dataset.validation)


def test_train_examples_are_balanced_and_nested(config):
  config.validation_examples = 100
  held_out = rows(dataset_lib.load(config).validation)
  config.train_examples = 205
  dataset = dataset_lib.load(config)
  labels = dataset.train.take(np.arange(205))[1]
  assert set(np.bincount(labels)) == {20, 21}
  assert rows(dataset.validation) == held_out
  assert not rows(dataset.train) & held_out
  config.train_examples = 100
  assert rows(dataset_lib.load(config).train) < rows(dataset.train)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"name": "cifar"}, "Did you mean 'cifar10"),
    ({"name": "mnist"}, "tfds/NAME"),
    ({"validation_examples": 1_437}, "leaves no training image"),
    ({"train_examples": 1_438}, "more than the 1437"),
    (
      {"train_examples": 1_400, "validation_examples": 100},
      "1337 training images that digits has after",
    ),
  ],
)
def test_impossible_parts(config, changes, message):
  config.update(changes)
  with pytest.raises(errors.ConfigError, match=message):
    dataset_lib.num_train_examples(config)


def test_digits_without_scikit_learn(config, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
  digits.read.cache_clear()  # See conftest.py.
  with pytest.raises(errors.ConfigError, match=r"resnet_flax\[digits\]"):
    dataset_lib.load(config)
