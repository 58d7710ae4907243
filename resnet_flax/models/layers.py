"""Convolutions and their padding, and the resizing of images."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_flax.models import group_norm

he_normal = nn.initializers.he_normal()

# The padding (before, after) of the rows, then of the columns.
Pads = Sequence[tuple[int, int]]


def window_pads(padding: str, size: tuple[int, int]) -> str | Pads:
  """The padding of a convolution or a pool whose window has an odd size.

  'same' is TensorFlow's rule: (0, 1) for a window of 3 at stride 2 on an even
  size. 'symmetric' pads half the window on every side, as PyTorch does.
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
  groups: int = 1,
  standardized: bool = False,
  bias_init: Any = nn.initializers.zeros,
  conv_general_dilated: Any = None,
) -> nn.Module:
  """A convolution with he_normal kernels; parameters are float32.

  `padding` is a rule of `window_pads`; `pads`, if given, replaces it.
  `conv_general_dilated`, by default `jax.lax`'s function, computes in `dtype`.
  `standardized` kernels have mean 0 and variance 1; see `group_norm`.
  """
  if standardized:
    conv_general_dilated = group_norm.standardize(conv_general_dilated)
  return nn.Conv(
    num_filters,
    kernel_size,
    strides,
    padding=pads or window_pads(padding, kernel_size),
    feature_group_count=groups,
    use_bias=use_bias,
    kernel_init=he_normal,
    bias_init=bias_init,
    dtype=dtype,
    conv_general_dilated=conv_general_dilated,
    name=name,
  )


def resize(images: jax.Array, size: int) -> jax.Array:
  """Bilinearly resizes float[B, H, W, C] to size x size; 0 changes nothing."""
  shape = (images.shape[0], size, size, images.shape[3])
  if not size or images.shape == shape:
    return images
  return jax.image.resize(images, shape, "bilinear")
