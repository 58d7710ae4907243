"""Data augmentation on the device: pure functions of (key, images, targets).

Images are float[B, H, W, C], already normalised: the recipe subtracts the mean
before it shifts, so edges are filled with normalised pixels. Targets are
int32[B] labels or float[B, classes] probabilities; augmentations that mix
images mix targets, too. `augment_bytes.py` has the augmentations of bytes.
"""

import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from resnet_flax.data import crops, mixing

Augment = mixing.Augment

# The recipe's width_shift_range and height_shift_range, as a fraction.
_SHIFT_RANGE = 0.1
# He et al. 2015, section 4.2: 4 pixels padded on each side.
_CROP_PADDING = 4


def translate(images: jax.Array, shifts: jax.Array) -> jax.Array:
  """Moves each image by float[B, 2] pixels down and to the right.

  Interpolates as `scipy.ndimage.shift(order=1, mode="nearest")` does.
  """
  # A translation is separable: one small matrix for the rows, one for the
  # columns. Matrix products suit every accelerator, gathers do not.
  rows = _interpolation_matrices(shifts[:, 0], images.shape[1], images.dtype)
  columns = _interpolation_matrices(shifts[:, 1], images.shape[2], images.dtype)
  # The highest precision keeps a TPU from rounding pixels to bfloat16.
  einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  images = einsum("bij,bjwc->biwc", rows, images)
  return einsum("bkw,biwc->bikc", columns, images)


def _interpolation_matrices(
  shifts: jax.Array, size: int, dtype: jnp.dtype
) -> jax.Array:
  """float[B, size, size]: row i holds the sources' weights in pixel i."""
  positions = jnp.arange(size, dtype=jnp.float32)
  sources = jnp.clip(positions[None, :] - shifts[:, None], 0, size - 1)
  distances = jnp.abs(sources[:, :, None] - positions[None, None, :])
  return jnp.maximum(0, 1 - distances).astype(dtype)


def crop(images: jax.Array, offsets: jax.Array, padding: int) -> jax.Array:
  """Pads each image with zeros and cuts a window of the original size.

  The window's top left corner is at int32[B, 2] `offsets`, 0 to 2 * padding.
  """
  padded = jnp.pad(images, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))

  def window(image, offset):
    return jax.lax.dynamic_slice(image, (*offset, 0), images.shape[1:])

  return jax.vmap(window)(padded, offsets)


def flip(images: jax.Array, mirrored: jax.Array) -> jax.Array:
  """Mirrors the images left to right where `mirrored`, bool[B], is True."""
  return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


# ---- Augmentations


def random_shift(key, images, targets):
  """The recipe's shift: continuous, by up to 10 % of height and width."""
  size = jnp.asarray(images.shape[1:3], jnp.float32)
  shape = images.shape[0], 2
  fractions = jax.random.uniform(key, shape, float, -_SHIFT_RANGE, _SHIFT_RANGE)
  return translate(images, fractions * size[None]), targets


def random_crop(key, images, targets):
  """He et al. 2015, section 4.2: pad with zeros, cut at random."""
  shape = images.shape[0], 2
  offsets = jax.random.randint(key, shape, 0, 2 * _CROP_PADDING + 1)
  return crop(images, offsets, _CROP_PADDING), targets


def random_flip(key, images, targets):
  """Mirrors half of the images."""
  mirrored = jax.random.bernoulli(key, shape=images.shape[:1])
  return flip(images, mirrored), targets


def nothing(key, images, targets):
  """Leaves images as they are."""
  return images, targets


# By `augment.name`: the augmentation before the flip.
MOVES: dict[str, Augment] = {
  "shift_flip": random_shift,
  "crop_flip": random_crop,
  # The host crops these images while it decodes them.
  **dict.fromkeys(crops.RANDOM, nothing),
  "none": nothing,
}


def create_augment(config: ConfigDict, num_classes: int) -> Augment:
  """The augmentation that `config.augment` describes, after normalisation."""
  flips = config.flip and config.name != "none" and not config.alternating_flip
  # An augmentation's place in this list decides its key. Append new ones, so
  # that the others keep theirs.
  used = [MOVES[config.name], random_flip if flips else nothing]
  if config.cutout:
    used.append(mixing.cutout(config.cutout))
  if config.mixup or config.cutmix:
    used.append(mixing.mix(config.mixup, config.cutmix, num_classes))
  return compose(*used)


def compose(*augmentations: Augment) -> Augment:
  """Applies augmentations in turn; each draws from a key of its own."""

  def augment(key, images, targets):
    keys = jax.random.split(key, len(augmentations))
    for key, augmentation in zip(keys, augmentations, strict=True):
      images, targets = augmentation(key, images, targets)
    return images, targets

  return augment
