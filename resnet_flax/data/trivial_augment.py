"""TrivialAugment: one random operation of random strength for each image.

Mueller and Hutter 2021 (arXiv:2103.10158), the wide set with torchvision's 31
levels. The operations are Pillow's on bytes, so they come before an image is
normalised. Pixels from outside an image are black.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

NUM_LEVELS = 31


def trivial_augment(key: Array, images: Array) -> Array:
  """Augments uint8[B, H, W, C] images, where C is 1 or 3."""
  keys = jax.random.split(key, 3)
  shape = images.shape[:1]
  numbers = jax.random.randint(keys[0], shape, 0, len(OPERATIONS))
  levels = jax.random.randint(keys[1], shape, 0, NUM_LEVELS) / (NUM_LEVELS - 1)
  signs = jax.random.rademacher(keys[2], shape, jnp.float32)
  kinds = list(OPERATIONS.values())
  # `vmap` computes all operations for each image: cheap beside a network.
  operate = jax.vmap(lambda k, *operands: jax.lax.switch(k, kinds, *operands))
  images = operate(numbers, images.astype(jnp.int32), levels * signs)
  return images.astype(jnp.uint8)


def _move(
  x: Array, matrix: Any = ((1, 0), (0, 1)), shift: Any = 0, origin: Any = 0
) -> Array:
  """Pixel p = (row, column) gets the value of pixel matrix @ p + shift."""
  height, width, channels = x.shape
  origin = jnp.reshape(jnp.asarray(origin), (-1, 1, 1))
  centers = jnp.mgrid[:height, :width] + 0.5 - origin
  matrix = jnp.asarray(matrix, jnp.float32)
  turned = jnp.einsum("ij,jhw->ihw", matrix, centers, precision="highest")
  shift = jnp.reshape(jnp.trunc(jnp.asarray(shift)), (-1, 1, 1))
  i, j = jnp.floor(turned + origin + shift).astype(jnp.int32)
  is_inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
  flat = jnp.where(is_inside, i * width + j, 0)
  return jnp.where(is_inside[..., None], x.reshape(-1, channels)[flat], 0)


def _rotate(x: Array, level: Array) -> Array:
  angle = jnp.deg2rad(135 * level)
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  center = jnp.asarray(x.shape[:2]) / 2
  return _move(x, [[cos, sin], [-sin, cos]], origin=center)


def _blend(x: Array, other: Array | int, level: Array) -> Array:
  """Blends: level -1 gives nearly `other`, 0 gives x, 1 goes beyond x."""
  blended = other + (1 + 0.99 * level) * (x - other)
  return jnp.clip(blended, 0, 255).astype(jnp.int32)


def _gray(x: Array) -> Array:
  """int32[H, W, 1] luma, in integers, as Pillow computes it."""
  if x.shape[-1] == 1:
    return x
  weights = jnp.asarray([[[19595, 38470, 7471]]])
  return (jnp.sum(x * weights, axis=-1, keepdims=True) + 2**15) >> 16


def _contrast(x: Array, level: Array) -> Array:
  mean = jnp.mean(_gray(x).astype(jnp.float32)) + 0.5
  return _blend(x, mean.astype(jnp.int32), level)


def _sharpness(x: Array, level: Array) -> Array:
  """Blends with a smoothed image, whose border pixels are those of x."""
  height, width, _ = x.shape
  near = [
    x[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)
  ]
  smooth = (2 * (sum(near) + 4 * near[4]) + 13) // 26  # Divides by 13, rounded.
  return _blend(x, x.at[1:-1, 1:-1].set(smooth), level)


def _posterize(x: Array, level: Array) -> Array:
  dropped = jnp.round(6 * jnp.abs(level)).astype(jnp.int32)
  return (x >> dropped) << dropped


def _auto_contrast(x: Array, level: Array) -> Array:
  low, high = (f(x, axis=(0, 1), keepdims=True) for f in (jnp.min, jnp.max))
  stretched = (x - low) * 255 // jnp.maximum(high - low, 1)
  return jnp.where(high > low, stretched, x)


def _equalize(x: Array, level: Array) -> Array:
  def of_channel(values):
    counts = jnp.zeros(256, jnp.int32).at[values].add(1)
    # Spreads all pixels but those of the largest value over 255 steps.
    step = (values.size - counts[jnp.max(values)]) // 255
    before = jnp.cumsum(counts) - counts
    table = (before + step // 2) // jnp.maximum(step, 1)
    return jnp.where(step > 0, jnp.minimum(table, 255)[values], values)

  return jax.vmap(of_channel, in_axes=2, out_axes=2)(x)


# Functions of int32[H, W, C] and a level in [-1, 1].
OPERATIONS = {
  "identity": lambda x, level: x,
  "auto_contrast": _auto_contrast,
  "equalize": _equalize,
  "rotate": _rotate,
  "solarize": lambda x, level: jnp.where(
    x < 255 * (1 - jnp.abs(level)), x, 255 - x
  ),
  "color": lambda x, level: _blend(x, _gray(x), level),
  "posterize": _posterize,
  "contrast": _contrast,
  "brightness": lambda x, level: _blend(x, 0, level),
  "sharpness": _sharpness,
  "shear_x": lambda x, level: _move(x, [[1, 0], [0.99 * level, 1]]),
  "shear_y": lambda x, level: _move(x, [[1, 0.99 * level], [0, 1]]),
  "translate_x": lambda x, level: _move(x, shift=(0, 32 * level)),
  "translate_y": lambda x, level: _move(x, shift=(32 * level, 0)),
}
