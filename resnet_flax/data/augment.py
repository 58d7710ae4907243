"""Data augmentation on the device: pure functions of (key, images).

Images are float[B, H, W, C], already normalised: the recipe subtracts the
mean before it shifts, so edges are filled with normalised pixels.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from resnet_flax.data import crops
from resnet_flax.run import errors

Augment = Callable[[jax.Array, jax.Array], jax.Array]

# The recipe's width_shift_range and height_shift_range, as a fraction.
_SHIFT_RANGE = 0.1
# He et al. 2015, section 4.2: 4 pixels padded on each side.
_CROP_PADDING = 4


def translate(images: jax.Array, shifts: jax.Array) -> jax.Array:
  """Moves each image by a continuous shift.

  Linear interpolation, edges filled with the nearest pixel: what
  `scipy.ndimage.shift(order=1, mode="nearest")` does.

  Args:
    images: float[B, H, W, C].
    shifts: float[B, 2], pixels down and to the right.

  Returns:
    float[B, H, W, C].
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
  """float[B, size, size]: row i holds the weights of the sources of pixel i."""
  positions = jnp.arange(size, dtype=jnp.float32)
  sources = jnp.clip(positions[None, :] - shifts[:, None], 0, size - 1)
  distances = jnp.abs(sources[:, :, None] - positions[None, None, :])
  return jnp.maximum(0, 1 - distances).astype(dtype)


def crop(images: jax.Array, offsets: jax.Array, padding: int) -> jax.Array:
  """Pads each image with zeros and cuts a window of the original size.

  Args:
    images: float[B, H, W, C].
    offsets: int32[B, 2], the window's top left corner in the padded image,
      from 0 to 2 * padding.
    padding: zeros added on each side, in pixels.

  Returns:
    float[B, H, W, C].
  """
  padded = jnp.pad(images, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))

  def window(image, offset):
    start = (offset[0], offset[1], 0)
    return jax.lax.dynamic_slice(image, start, images.shape[1:])

  return jax.vmap(window)(padded, offsets)


def flip(images: jax.Array, mirrored: jax.Array) -> jax.Array:
  """Mirrors the images left to right where `mirrored`, bool[B], says so."""
  return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def _random_shift(key: jax.Array, images: jax.Array) -> jax.Array:
  size = jnp.asarray(images.shape[1:3], jnp.float32)
  fractions = jax.random.uniform(
    key, (images.shape[0], 2), minval=-_SHIFT_RANGE, maxval=_SHIFT_RANGE
  )
  return translate(images, fractions * size[None])


def _random_crop(key: jax.Array, images: jax.Array) -> jax.Array:
  offsets = jax.random.randint(
    key, (images.shape[0], 2), 0, 2 * _CROP_PADDING + 1
  )
  return crop(images, offsets, _CROP_PADDING)


def _identity(key: jax.Array, images: jax.Array) -> jax.Array:
  del key
  return images


# Each moves the image; the flip that follows is common to them.
_MOVES: dict[str, Augment] = {
  "shift_flip": _random_shift,
  "crop_flip": _random_crop,
  # These have been cut on the host, as they were decoded.
  **dict.fromkeys(crops.RANDOM, _identity),
}

NAMES = (*_MOVES, "none")


def create_augment(config: ConfigDict) -> Augment:
  """The augmentation that `config.augment` names.

  Args:
    config: the `augment` part of the configuration.

  Returns:
    A function of (key, float[B, H, W, C]) that returns float[B, H, W, C].

  Raises:
    ConfigError: the name is unknown.
  """
  if config.name == "none":
    return lambda key, images, targets: (images, targets)
  if config.name not in _MOVES:
    raise errors.unknown_name("augment.name", config.name, NAMES)
  move = _MOVES[config.name]
  with_flip = config.flip

  def augment(key, images, targets):
    move_key, flip_key = jax.random.split(key)
    images = move(move_key, images)
    if not with_flip:
      return images, targets
    return flip(
      images, jax.random.bernoulli(flip_key, shape=images.shape[:1])
    ), targets

  return augment
