"""What comes before the blocks of a residual network.

To be called in a module's `nn.compact` method, which the layers belong to.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from resnet_flax.models import layers

Stem = Callable[..., jax.Array]


def small_images(
  x: jax.Array,
  num_filters: int,
  *,
  conv: Callable[..., nn.Module],
  norm: Callable[..., nn.Module],
) -> jax.Array:
  """3x3 convolution, BN, activation (He et al. 2015, section 4.2).

  Args:
    x: float[B, H, W, C] images.
    num_filters: channels that come out.
    conv: makes a convolution.
    norm: makes a batch norm with an activation.

  Returns:
    float[B, H, W, num_filters].
  """
  x = conv(num_filters, (3, 3), 1, name="stem_conv")(x)
  return norm(name="stem_bn")(x)


def large_images(
  x: jax.Array,
  num_filters: int,
  *,
  padding: str,
  conv: Callable[..., nn.Module],
  norm: Callable[..., nn.Module],
) -> jax.Array:
  """7x7 convolution and 3x3 max pool at stride 2 (He et al. 2015, table 1).

  Args:
    x: float[B, H, W, C] images.
    num_filters: channels that come out.
    padding: of the pool, one of `layers.PADDINGS`.
    conv: makes a convolution.
    norm: makes a batch norm with an activation.

  Returns:
    float[B, ceil(H / 4), ceil(W / 4), num_filters].
  """
  x = conv(num_filters, (7, 7), 2, name="stem_conv")(x)
  x = norm(name="stem_bn")(x)
  return nn.max_pool(x, (3, 3), (2, 2), layers.window_pads(padding, (3, 3)))
