"""Augmentation of uint8[B, H, W, C] images on the device, before normalisation.

Pure functions of (key, images, epoch); `epoch` is int32[] and 0-based.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from resnet_flax.data import augment
from resnet_flax.data.trivial_augment import trivial_augment


def alternating_flip(images: jax.Array, epoch: jax.Array) -> jax.Array:
  """Mirrors half of the images in even epochs, the other half in odd epochs.

  Jordan 2024 (arXiv:2404.00498). A hash of an image's pixels decides its half,
  so it is the same in every run, but a new random crop may change it.
  """
  shape = images.shape[1:]
  odd = 2 * np.arange(math.prod(shape), dtype=np.uint32) + 1
  # Knuth's multiplicative hash, modulo 2**32.
  weights = (odd * np.uint32(2654435761)).reshape(shape)
  sums = jnp.sum(images.astype(jnp.uint32) * weights[None], axis=(1, 2, 3))
  return augment.flip(images, (sums >> 31) == (epoch + 1) % 2)


def create(
  config: ConfigDict,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
  """The augmentation of bytes that `config.augment` describes."""
  alternates, is_trivial = config.alternating_flip, config.trivial_augment

  def augment_bytes(key, images, epoch):
    if alternates:
      images = alternating_flip(images, epoch)
    if is_trivial:
      # `augment.compose` makes keys 0, 1, ... of the same key. Here keys count
      # down: append a new augmentation below, with 2**32 - 2.
      images = trivial_augment(jax.random.fold_in(key, 2**32 - 1), images)
    return images

  return augment_bytes
