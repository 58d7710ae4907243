"""Residual blocks that activate before their convolutions.

He et al. 2016 (arXiv:1603.05027) is the source, Zagoruyko and Komodakis 2016
(arXiv:1605.07146) that of the wide ones. See `blocks` for what they share.
"""

import functools

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from resnet_flax.models import blocks
from resnet_flax.models.blocks import NO_CONTEXT, Block, Context


class PreActBlock(Block):
  """BN-ReLU-3x3, BN-ReLU-3x3, add (He et al. 2016, figure 4e).

  The first block of the network does not repeat the stem's BN-ReLU, and the
  shortcut takes the block's input as it comes (section 4 and appendix).
  """

  @nn.compact
  def __call__(self, x: jax.Array, context: Context = NO_CONTEXT) -> jax.Array:
    """See `Block`."""
    y = x
    if not self.first_in_network:
      y = self.norm(act=self.act, name="bn1")(y)
    y = self.conv(self.inner_filters, (3, 3), self.strides, name="conv1")(y)
    y = self.norm(act=self.act, name="bn2")(y)
    y = self.conv(self.num_filters, (3, 3), 1, name="conv2")(y)
    return self.apply_shortcut(x) + self.apply_branch(y, context)


class PreActBottleneckBlock(Block):
  """BN-ReLU-1x1, BN-ReLU-3x3, BN-ReLU-1x1, add (He et al. 2016).

  As in the Keras example the first 1x1 carries the stride, the shortcut takes
  the block's input as it comes, and the first block of the network does not
  repeat the stem's BN-ReLU.
  """

  @nn.compact
  def __call__(self, x: jax.Array, context: Context = NO_CONTEXT) -> jax.Array:
    """See `Block`."""
    y = x
    if not self.first_in_network:
      y = self.norm(act=self.act, name="bn1")(y)
    y = self.conv(self.inner_filters, (1, 1), self.strides, name="conv1")(y)
    y = self.norm(act=self.act, name="bn2")(y)
    y = self.conv(self.inner_filters, (3, 3), 1, name="conv2")(y)
    y = self.norm(act=self.act, name="bn3")(y)
    y = self.conv(self.num_filters, (1, 1), 1, name="conv3")(y)
    return self.apply_shortcut(x) + self.apply_branch(y, context)


class WideBlock(Block):
  """BN-ReLU-3x3, BN-ReLU-dropout-3x3, add (Zagoruyko and Komodakis, figure 1d).

  As in the authors' code the shortcut takes what the first BN-ReLU gives where
  the shape changes. The first block of the network has the stem's BN-ReLU.
  """

  dropout: float = 0.0  # Share of the pixels of channels that is dropped.

  @nn.compact
  def __call__(self, x: jax.Array, context: Context = NO_CONTEXT) -> jax.Array:
    """See `Block`."""
    y = x
    if not self.first_in_network:
      y = self.norm(act=self.act, name="bn1")(y)
    same_shape = self.strides == 1 and x.shape[-1] == self.num_filters
    residual = self.apply_shortcut(x if same_shape else y)
    y = self.conv(self.inner_filters, (3, 3), self.strides, name="conv1")(y)
    y = self.norm(act=self.act, name="bn2")(y)
    if self.train and self.dropout:
      assert context.key is not None  # In training.
      key = jax.random.fold_in(context.key, 1)  # It itself is the branch's.
      y = nn.Dropout(self.dropout, deterministic=False)(y, rng=key)
    y = self.conv(self.num_filters, (3, 3), 1, name="conv2")(y)
    return residual + self.apply_branch(y, context)


# ---- By the configuration


def preact(
  config: ConfigDict, stem: int
) -> tuple[blocks.BlockDef, blocks.Widths]:
  """As wide as basic blocks."""
  return PreActBlock, blocks.doubling(stem, stem)


def keras_bottleneck(
  config: ConfigDict, stem: int
) -> tuple[blocks.BlockDef, blocks.Widths]:
  """The Keras example's v2: a stage is as wide inside as its input is."""
  outer = [stem, *(4 * stem * 2**k for k in range(3))]
  return PreActBottleneckBlock, lambda stage: (outer[stage], outer[stage + 1])


def wide(
  config: ConfigDict, stem: int
) -> tuple[blocks.BlockDef, blocks.Widths]:
  """So many times as wide as basic blocks."""
  block = functools.partial(WideBlock, dropout=config.block_dropout)
  return block, blocks.doubling(*[stem * config.widen_factor] * 2)
