import dataclasses

import numpy as np
import pytest

from configs import base
from resnet_flax.data import digits, loading
from resnet_flax.run import errors


@pytest.fixture
def config():
  config = base.get_config().dataset
  config.name = "digits"
  return config


def rows(split):
  return set(split.indices)


def test_digits_are_what_is_announced(config):
  dataset = loading.load(config)
  info = loading.DATASETS["digits"]
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
  averaged = arrays.test_images[..., 0].reshape(-1, 8, 4, 8, 4).mean((2, 4))
  matched = np.abs(averaged[0] - small * 255 / 16).mean((1, 2)).min()
  assert matched < 20


def test_validation_is_held_out(config):
  config.validation_examples = 200
  dataset = loading.load(config)
  assert len(dataset.validation) == 200
  assert len(dataset.train) == 1_437 - 200
  assert not rows(dataset.train) & rows(dataset.validation)
  labels = dataset.validation.take(np.arange(200))[1]
  expected = np.bincount(dataset.train.labels) * 200 / 1_437
  assert (np.abs(np.bincount(labels) - expected) < 1).all()
  again = loading.load(config)
  assert rows(again.validation) == rows(dataset.validation)
  config.split_seed = 1
  assert rows(loading.load(config).validation) != rows(dataset.validation)


def test_train_examples_are_balanced_and_nested(config):
  config.validation_examples = 100
  held_out = rows(loading.load(config).validation)
  config.train_examples = 205
  dataset = loading.load(config)
  labels = dataset.train.take(np.arange(205))[1]
  assert set(np.bincount(labels)) == {20, 21}
  assert rows(dataset.validation) == held_out
  assert not rows(dataset.train) & held_out
  config.train_examples = 100
  assert rows(loading.load(config).train) < rows(dataset.train)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"name": "cifar"}, "Did you mean 'cifar10"),
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
    loading.num_train_examples(config)


def test_wrong_number_of_images_is_an_error(config, monkeypatch):
  info = loading.DATASETS["digits"]
  monkeypatch.setitem(
    loading.DATASETS, "digits", dataclasses.replace(info, num_train=1_400)
  )
  with pytest.raises(errors.DataError, match="needed: 1400"):
    loading.load(config)


def test_digits_without_scikit_learn(config, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
  with pytest.raises(errors.DataError, match=r"resnet_flax\[digits\]"):
    loading.load(config)
