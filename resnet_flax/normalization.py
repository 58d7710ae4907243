"""What is subtracted from images, measured on the training split."""

import jax.numpy as jnp
import numpy as np

from resnet_flax import datasets, errors, train_step

NAMES = ("pixel_mean", "channel", "none")

# Keeps a constant channel from dividing by zero.
_MIN_STD = 1e-6


def measure(name: str, train: datasets.Split) -> train_step.Normalization:
  """Measures the normalisation called `name`.

  Args:
    name: 'pixel_mean' (the recipe: the mean image, [H, W, C]), 'channel'
      (mean and standard deviation of each channel, [1, 1, C]) or 'none'.
    train: the images trained on; held-out images are not among them.

  Raises:
    ConfigError: an unknown name.
  """
  if name not in NAMES:
    raise errors.unknown_name("normalization", name, NAMES)
  if name == "none":
    return placeholder(name, train.images.shape[1:])
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
  return train_step.Normalization(
    mean=jnp.asarray(mean, jnp.float32), std=jnp.asarray(std, jnp.float32)
  )


def placeholder(
  name: str, image_shape: tuple[int, int, int]
) -> train_step.Normalization:
  """What `measure` returns in shape, without any data: no change at all."""
  shape = image_shape if name == "pixel_mean" else (1, 1, image_shape[-1])
  return train_step.Normalization(
    mean=jnp.zeros(shape), std=jnp.ones((1, 1, image_shape[-1]))
  )
