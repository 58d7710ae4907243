import dataclasses

import numpy as np
import pytest

from resnet_flax.data import dataset as record
from resnet_flax.run import errors


def test_subset_of_a_subset(arrays):
  split = record.whole_split(arrays.train_images, arrays.train_labels)
  part = split.subset(np.array([1, 3, 5])).subset(np.array([2, 0]))
  images, labels = part.take(np.array([0, 1]))
  assert len(part) == 2
  np.testing.assert_array_equal(labels, [5, 1])
  np.testing.assert_array_equal(images, arrays.train_images[[5, 1]])


def test_good_arrays_pass(arrays):
  record.check(arrays, "some", (32, 32, 3))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {
        "test_images": np.zeros((0, 32, 32, 3), np.uint8),
        "test_labels": np.zeros(0, np.int32),
      },
      "the test split is empty",
    ),
    ({"train_images": np.zeros((6, 28, 28, 3), np.uint8)}, r"28, 28, 3\]; nee"),
    ({"train_images": np.zeros((6, 32, 32, 1), np.uint8)}, "32, 32, 1"),
    ({"train_images": np.zeros((6, 32, 32, 3), np.float32)}, "float32"),
    ({"train_images": np.zeros((5, 32, 32, 3), np.uint8)}, "6 labels"),
    ({"test_labels": np.array([0, 1, 6], np.int32)}, "labels from 0 to 6"),
    ({"test_labels": np.array([0, 1, -1], np.int32)}, "labels from -1"),
    ({"test_labels": np.array([0, 1, np.nan])}, r"float64\[3\]; needed: int32"),
    ({"test_labels": np.zeros((3, 1), np.int32)}, r"int32\[3, 1\]; needed"),
    ({"test_labels": np.zeros((), np.int32)}, r"int32\[\]; needed"),
  ],
)
def test_bad_arrays_are_named(arrays, changes, message):
  with pytest.raises(errors.DataError, match=message):
    record.check(dataclasses.replace(arrays, **changes), "some", (32, 32, 3))
