"""What is subtracted from images: measured on the training split, or fixed."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from resnet_flax import data as datasets
from resnet_flax.run import errors

# Mean and standard deviation of red, green and blue that published weights
# were trained with: torchvision's, and Caffe's, which divides by nothing. Both
# of images / 255.
_FIXED = {
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  "caffe": (
    (123.68 / 255, 116.779 / 255, 103.939 / 255),
    (1 / 255, 1 / 255, 1 / 255),
  ),
}

NAMES = ("pixel_mean", "channel", "none", *_FIXED)

# Those that need no data.
UNMEASURED = ("none", *_FIXED)


class Normalization(flax.struct.PyTreeNode):
  """What is done to images / 255: subtract `mean`, divide by `std`.

  Part of the train state, so that a checkpoint can score images by itself.
  Both are float32 and broadcast against [H, W, C].
  """

  mean: jax.Array
  std: jax.Array

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps uint8[B, H, W, C] to float32[B, H, W, C]."""
    images = images.astype(jnp.float32) / 255
    return (images - self.mean[None]) / self.std[None]


# Keeps a constant channel from dividing by zero.
_MIN_STD = 1e-6


def measure(name: str, train: datasets.Split) -> Normalization:
  """Measures the normalisation called `name`.

  Args:
    name: 'pixel_mean' (the recipe: the mean image, [H, W, C]), 'channel'
      (mean and standard deviation of each channel, [1, 1, C]), or one of
      `UNMEASURED`, see `fixed`.
    train: the images trained on; held-out images are not among them.

  Raises:
    ConfigError: an unknown name.
  """
  if name not in NAMES:
    raise errors.unknown_name("normalization", name, NAMES)
  if name in UNMEASURED:
    return fixed(name, train.image_shape)
  # Streamed sets are refused by `run.rules`.
  images, _ = train.take(np.arange(len(train)))
  if name == "pixel_mean":
    # Integer sums: exact, whatever the order and the number of threads.
    mean = images.sum(axis=0, dtype=np.int64) / (len(images) * 255)
    std = np.ones((1, 1, images.shape[-1]))
  else:
    axes, count = (0, 1, 2), images[..., 0].size
    mean = images.sum(axis=axes, dtype=np.int64) / (count * 255)
    squares = np.arange(256, dtype=np.int64)[:, None] ** 2
    histograms = np.stack(
      [
        np.bincount(channel.ravel(), minlength=256)
        for channel in np.moveaxis(images, -1, 0)
      ],
      axis=1,
    )
    variance = (histograms * squares).sum(axis=0) / (count * 255**2) - mean**2
    std = np.maximum(np.sqrt(np.maximum(variance, 0)), _MIN_STD)
    mean, std = mean[None, None], std[None, None]
  return Normalization(
    mean=jnp.asarray(mean, jnp.float32), std=jnp.asarray(std, jnp.float32)
  )


def fixed(name: str, image_shape: tuple[int, ...]) -> Normalization:
  """A normalisation that does not depend on the data.

  Args:
    name: 'none'; 'imagenet', by the channels' mean and standard deviation that
      torchvision's networks and many others were trained with; 'caffe', by the
      means alone in units of 1/255, as He et al. published and
      `keras.applications` wants.
    image_shape: (H, W, C), with three channels but for 'none'.
  """
  if name == "none":
    return placeholder(name, image_shape)
  mean, std = (jnp.asarray(x, jnp.float32)[None, None] for x in _FIXED[name])
  return Normalization(mean=mean, std=std)


def placeholder(name: str, image_shape: tuple[int, ...]) -> Normalization:
  """What `measure` returns in shape, without any data: no change at all."""
  shape = image_shape if name == "pixel_mean" else (1, 1, image_shape[-1])
  return Normalization(
    mean=jnp.zeros(shape), std=jnp.ones((1, 1, image_shape[-1]))
  )
