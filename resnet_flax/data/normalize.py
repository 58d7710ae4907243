"""Normalisation of images: measured on the training split, or fixed."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from resnet_flax.data import types

# Means and standard deviations of images / 255 that published weights were
# trained with: torchvision's; those of VGG and keras.applications, where a std
# of 1 / 255 keeps the scale of Caffe's images, 0 to 255.
_FIXED = {
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  "caffe": ((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3),
}

# `UNMEASURED` names need no data; `NAMES` are all names.
UNMEASURED = ("none", *_FIXED)
NAMES = ("pixel_mean", "channel", *UNMEASURED)


class Normalization(flax.struct.PyTreeNode):
  """Normalises images: (images / 255 - `mean`) / `std`.

  The train state has it, so that a checkpoint can score images by itself.
  `mean` and `std` are float32 and broadcast against [H, W, C].
  """

  mean: jax.Array
  std: jax.Array

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps uint8[B, H, W, C] to float32; other images raise ValueError."""
    if images.dtype != np.uint8 or images.shape[-1] != self.mean.shape[-1]:
      raise ValueError(
        f"normalisation needs uint8 images of {self.mean.shape[-1]} channels;"
        f" got {images.dtype}{list(images.shape)}."
      )
    images = images.astype(jnp.float32) / 255
    return (images - self.mean[None]) / self.std[None]


# A channel of one constant value must not divide by 0.
_MIN_STD = 1e-6


def measure(name: str, train: types.Split) -> Normalization:
  """Measures the normalisation called `name` on the training images.

  'pixel_mean', the recipe's, is the mean image, [H, W, C]. 'channel' has each
  channel's mean and standard deviation, [1, 1, C]. For other names see `fixed`.
  """
  if name in UNMEASURED:
    return fixed(name, train.image_shape)
  # `run/rules.py` refuses streamed sets, which may not fit into memory.
  images, _ = train.take(np.arange(len(train)))
  axes = (0,) if name == "pixel_mean" else (0, 1, 2)
  # Integer sums: exact, whatever the order and the number of threads.
  sums = images.sum(axis=axes, dtype=np.int64, keepdims=True)[0]
  count = images.size // sums.size
  mean, std = sums / (count * 255), np.ones((1, 1, images.shape[-1]))
  if name == "channel":
    squares = np.einsum("nhwc,nhwc->c", images, images, dtype=np.int64)
    variance = squares / (count * 255**2) - mean**2
    std = np.maximum(np.sqrt(np.maximum(variance, 0)), _MIN_STD)
  return Normalization(*(jnp.asarray(x, jnp.float32) for x in (mean, std)))


def fixed(name: str, image_shape: tuple[int, ...]) -> Normalization:
  """A normalisation that does not depend on the data: one of `UNMEASURED`."""
  if name == "none":
    return placeholder(name, image_shape)
  return Normalization(
    *(jnp.asarray(x, jnp.float32)[None, None] for x in _FIXED[name])
  )


def placeholder(name: str, image_shape: tuple[int, ...]) -> Normalization:
  """Only divides by 255, with the shapes that `measure` gives for `name`."""
  shape = image_shape if name == "pixel_mean" else (1, 1, image_shape[-1])
  std = jnp.ones((1, 1, image_shape[-1]), jnp.float32)
  return Normalization(jnp.zeros(shape, jnp.float32), std)
