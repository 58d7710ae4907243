"""scikit-learn's handwritten digits as 32x32 colour images.

1,797 real 8x8 scans with 17 grey levels (UCI "Optical Recognition of
Handwritten Digits", test part), which ship with scikit-learn.
"""

import numpy as np

from resnet_flax.data import randomness, splits, types
from resnet_flax.run import errors

_TEST_EXAMPLES = 360


def read() -> types.Arrays:
  """The digits; 360 of them, drawn by class, are the test split."""
  from PIL import Image

  with errors.extra("digits", "dataset.name=digits"):
    from sklearn.datasets import load_digits
  digits = load_digits()
  labels = digits.target.astype(np.int32)
  grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
  large = (
    Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)
    for image in grey
  )
  images = np.stack([np.asarray(image.convert("RGB")) for image in large])
  rng = randomness.host_rng(0, randomness.Purpose.TEST_SPLIT)
  quotas = splits.proportional_quotas(np.bincount(labels), _TEST_EXAMPLES)
  test = splits.draw(labels, quotas, rng)
  train = np.setdiff1d(np.arange(len(labels)), test)
  return {
    "train_images": images[train],
    "train_labels": labels[train],
    "test_images": images[test],
    "test_labels": labels[test],
    "class_names": digits.target_names.astype(str),
  }
