"""Stems: the layers before the blocks of a residual network.

Call a stem in a Flax module's `nn.compact` method: that module owns its layers.
"""

import flax.linen as nn
import jax

from resnet_flax.models import layers
from resnet_flax.models.blocks import ModuleDef


def small_images(
  x: jax.Array, num_filters: int, *, conv: ModuleDef, norm: ModuleDef
) -> jax.Array:
  """3x3 convolution, BN, activation (He et al. 2015, section 4.2).

  Maps float[B, H, W, C] to float[B, H, W, num_filters].
  """
  x = conv(num_filters, (3, 3), 1, name="stem_conv")(x)
  return norm(name="stem_bn")(x)


def large_images(
  x: jax.Array,
  num_filters: int,
  *,
  padding: str,
  conv: ModuleDef,
  norm: ModuleDef,
) -> jax.Array:
  """7x7 convolution, BN, activation, 3x3 max pool (He et al. 2015, table 1).

  Maps float[B, H, W, C] to float[B, ceil(H / 4), ceil(W / 4), num_filters].
  Both strides are 2. `padding` is the pool's; see `layers.window_pads`.
  """
  x = conv(num_filters, (7, 7), 2, name="stem_conv")(x)
  x = norm(name="stem_bn")(x)
  return nn.max_pool(x, (3, 3), (2, 2), layers.window_pads(padding, (3, 3)))
