"""Blocks with gates: Srivastava et al. 2015 (arXiv:1505.00387)."""

import functools

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from resnet_flax.models import blocks
from resnet_flax.models.blocks import NO_CONTEXT, Block, Context


class HighwayBlock(Block):
  """(1 - g) * shortcut + g * F, then ReLU, with g = sigmoid(1x1 conv).

  g is the transform gate and 1 - g the carry gate of Srivastava et al. 2015,
  F the basic block's two convolutions: 'exclusive gating' of He et al. 2016,
  section 3.1. `gate_bias` is where the gate's bias starts; the more negative,
  the nearer is the block to its shortcut.
  """

  gate_bias: float = -2.0

  @nn.compact
  def __call__(self, x: jax.Array, context: Context = NO_CONTEXT) -> jax.Array:
    """See `Block`."""
    y = self.conv(self.inner_filters, (3, 3), self.strides, name="conv1")(x)
    y = self.norm(act=self.act, name="bn1")(y)
    y = self.conv(self.num_filters, (3, 3), 1, name="conv2")(y)
    y = self.norm(name="bn2")(y)
    # The bias is what holds the gate shut, so it is there in any case.
    gate = self.conv(
      self.num_filters,
      (1, 1),
      self.strides,
      use_bias=True,
      bias_init=nn.initializers.constant(self.gate_bias),
      name="gate_conv",
    )(x)
    gate = nn.sigmoid(gate)
    y = self.apply_branch(y, context)
    return self.act((1 - gate) * self.apply_shortcut(x) + gate * y)


def highway(
  config: ConfigDict, stem: int
) -> tuple[blocks.BlockDef, blocks.Widths]:
  """As wide as basic blocks."""
  block = functools.partial(HighwayBlock, gate_bias=config.gate_bias)
  return block, blocks.doubling(stem, stem)
