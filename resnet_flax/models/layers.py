"""The layers that networks are built from, with the recipe's defaults."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resnet_flax.models.kernels import convolution
from resnet_flax.run import errors

he_normal = nn.initializers.he_normal()

PADDINGS = ("same", "symmetric")

# Rows and columns, before and after.
Pads = Sequence[tuple[int, int]]


def window_pads(padding: str, size: tuple[int, int]) -> str | Pads:
  """What a convolution or a pool is to be padded with.

  Args:
    padding: 'same' is TensorFlow's rule, (0, 1) for a window of 3 at stride 2
      on an even size; 'symmetric' pads half the window on every side, as
      Caffe and PyTorch do.
    size: height and width of the window, odd.
  """
  if padding == "same":
    return "SAME"
  return [(length // 2, length // 2) for length in size]


def conv(
  num_filters: int,
  kernel_size: tuple[int, int],
  strides: int,
  *,
  padding: str,
  use_bias: bool,
  dtype: jnp.dtype,
  name: str,
  pads: Pads | None = None,
  bias_init: Any = nn.initializers.zeros,
) -> nn.Module:
  """A convolution with he_normal kernels.

  Args:
    num_filters: channels that come out.
    kernel_size: height and width, odd.
    strides: the same in both directions.
    padding: see `window_pads`.
    use_bias: whether a bias is added.
    dtype: what is computed in; parameters are float32.
    name: of the module.
    pads: replaces what `padding` says.
    bias_init: the bias's initializer.
  """
  return nn.Conv(
    num_filters,
    kernel_size,
    strides,
    padding=pads or window_pads(padding, kernel_size),
    use_bias=use_bias,
    kernel_init=he_normal,
    bias_init=bias_init,
    dtype=dtype,
    conv_general_dilated=convolution.conv_general_dilated,
    name=name,
  )


def check_input_size(
  height: int, width: int, input_sizes: tuple[int, int]
) -> None:
  """Refuses images that a network's stem is not made for.

  Args:
    height: pixels.
    width: pixels.
    input_sizes: the smallest and the largest side that the network takes.

  Raises:
    ConfigError: the images are smaller or larger.
  """
  low, high = input_sizes
  if min(height, width) < low:
    raise errors.ConfigError(
      f"{height}x{width} images are too small for the network's stem, which"
      f" takes {low}x{low} and more: model.input_size=224 enlarges them, or"
      " take a model.name for small images (resnet_v1, resnet_v2, plain,"
      " preact, highway)."
    )
  if max(height, width) > high:
    raise errors.ConfigError(
      f"{height}x{width} images are too large for the network's stem, which"
      f" takes up to {high}x{high}: set a smaller model.input_size, or take a"
      " model.name for large images (resnet_imagenet, plain_imagenet, vgg,"
      " alexnet)."
    )


def fit(
  images: jax.Array, input_size: int, input_sizes: tuple[int, int]
) -> jax.Array:
  """Images as a network wants them: resized bilinearly, then checked.

  Args:
    images: float[B, H, W, C].
    input_size: height and width of the result; 0 leaves images as they are.
    input_sizes: the smallest and the largest side that the network takes.

  Raises:
    ConfigError: see `check_input_size`.
  """
  if input_size:
    shape = (images.shape[0], input_size, input_size, images.shape[3])
    if images.shape != shape:
      images = jax.image.resize(images, shape, "bilinear")
  check_input_size(images.shape[1], images.shape[2], input_sizes)
  return images


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
  """The means over a grid of size x size windows that cover the image.

  Window i of a side of length n goes from floor(i * n / size) to
  ceil((i + 1) * n / size), as in PyTorch: whatever the image's size, what
  comes after has the same shape, and an image of that size stays as it is.

  Args:
    x: float[B, H, W, C].
    size: windows along each side.

  Returns:
    float[B, size, size, C].
  """
  if x.shape[1:3] == (size, size):
    return x
  rows, columns = (_window_means(length, size) for length in x.shape[1:3])
  pooled = jnp.einsum(
    "ph,bhwc,qw->bpqc", rows, x, columns, precision=lax.Precision.HIGHEST
  )
  return pooled.astype(x.dtype)


def _window_means(length: int, size: int) -> np.ndarray:
  """float32[size, length]: the weight of each pixel in each mean."""
  weights = np.zeros((size, length), np.float32)
  for i in range(size):
    start, stop = i * length // size, math.ceil((i + 1) * length / size)
    weights[i, start:stop] = 1 / (stop - start)
  return weights
