"""Compares parts of the recipe with the same parts of the Keras example."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from resnet_flax import data
from resnet_flax.data import augment, normalize, randomness
from resnet_flax.optim import learning_rates
from resnet_flax.parallel import program

DRAWS = 10_000
NUM_IMAGES = 4
EPOCHS = 200


def images(dataset: data.Dataset) -> np.ndarray:
  """Training images less the mean image, float32[4, 32, 32, 3]."""
  chosen, _ = dataset.train.take(np.arange(NUM_IMAGES))
  normalization = normalize.measure("pixel_mean", dataset.train)
  return np.asarray(normalization(jnp.asarray(chosen)))


def compare(
  config: ConfigDict, shown: np.ndarray, theirs: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Compares our learning rates, augmented images and orders with Keras's.

  `shown` comes from `images`, `theirs` from `keras_example.checks`. Only
  pixels and channels that vary count: `largest_z` is the largest difference of
  the draws' means, in standard errors, and `deviations` has the least and the
  largest ratio of standard deviations, ours over theirs.
  """
  rates = _rates(config)
  augmentation = augment.create_augment(config.augment, 10)

  @jax.jit
  def drawn(key: jax.Array, image: jax.Array) -> jax.Array:
    labels = jnp.zeros(DRAWS, jnp.int32)
    repeated = jnp.broadcast_to(image, (DRAWS, *image.shape))
    return augmentation(key, repeated, labels)[0]

  zs, ratios = [], []
  for k, (image, (mean, variance)) in enumerate(
    zip(shown, theirs["moments"], strict=True)
  ):
    purpose = randomness.Purpose.AUGMENTATION
    ours = np.asarray(drawn(randomness.device_key(k, purpose), image))
    # Pixels within a uniform area do not vary.
    varies = variance > 1e-6
    std_error = np.sqrt((ours.var(axis=0) + variance) / DRAWS)
    zs.append(np.abs(ours.mean(axis=0) - mean)[varies] / std_error[varies])
    ratios.append((ours.std(axis=0) / np.sqrt(variance))[varies])
  orders = {
    "theirs": theirs["orders"],
    "ours": np.array(
      [program.order(1000, 8, 0, epoch).ravel() for epoch in range(3)]
    ),
  }
  return {
    "images": len(shown),
    "draws": DRAWS,
    "pixels": int(sum(map(len, zs))),
    "largest_z": float(max(map(np.max, zs))),
    "share_of_z_above_1.96": float(np.mean(np.concatenate(zs) > 1.96)),
    "deviations": [
      float(min(map(np.min, ratios))),
      float(max(map(np.max, ratios))),
    ],
    "largest_relative_difference_of_rates": float(
      np.max(np.abs(rates / theirs["rates"] - 1))
    ),
    "epochs": EPOCHS,
    **{
      f"{side}_every_epoch_is_another_permutation": bool(
        all(np.array_equal(np.sort(o), np.arange(1000)) for o in epochs)
        and len(np.unique(epochs, axis=0)) == len(epochs)
      )
      for side, epochs in orders.items()
    },
  }


def _rates(config: ConfigDict) -> np.ndarray:
  """The learning rate of each epoch's first step."""
  rate = learning_rates.create_learning_rate(config, 10)
  state = rate.rules.init()
  steps = jnp.arange(0, 10 * EPOCHS, 10)
  return np.asarray(jax.vmap(lambda step: rate(step, state))(steps))
