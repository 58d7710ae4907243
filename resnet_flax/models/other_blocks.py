"""All blocks except the basic one; `blocks` has their base class.

Sources: He et al. 2015 (arXiv:1512.03385) for bottlenecks; Xie et al. 2017
(arXiv:1611.05431) for groups; Srivastava et al. 2015 (arXiv:1505.00387) for
gates; He et al. 2016 (arXiv:1603.05027) for pre-activation; Zagoruyko and
Komodakis 2016 (arXiv:1605.07146) for wide blocks.
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from resnet_flax.models import blocks
from resnet_flax.models.blocks import NO_CONTEXT, Block, BlockAndWidths, Context

# He et al. 2015, table 1: the number of blocks in each stage, by depth. Blocks
# are bottlenecks from 50 layers on.
FIRST_BOTTLENECK = 50
IMAGENET_SIZES: Mapping[int, tuple[int, ...]] = {
  18: (2, 2, 2, 2),
  34: (3, 4, 6, 3),
  50: (3, 4, 6, 3),
  101: (3, 4, 23, 3),
  152: (3, 8, 36, 3),
}


class BottleneckBlock(Block):
  """1x1-BN-ReLU, 3x3-BN-ReLU, 1x1-BN, add, ReLU (He et al. 2015, figure 5).

  With `stride_in_3x3` the 3x3 convolution carries the stride, as in torchvision
  ('ResNet v1.5'); otherwise the first 1x1 does, as in the paper. With several
  `groups` of channels this is ResNeXt's block (Xie et al. 2017, figure 3c).
  """

  stride_in_3x3: bool = False
  groups: int = 1

  @nn.compact
  def __call__(self, x: jax.Array, context: Context = NO_CONTEXT) -> jax.Array:
    """See `Block`."""
    first, second = self.strides, 1
    if self.stride_in_3x3:
      first, second = second, first
    y = self.conv(self.inner_filters, (1, 1), first, name="conv1")(x)
    y = self.norm(act=self.act, name="bn1")(y)
    grouped = functools.partial(self.conv, groups=self.groups, name="conv2")
    y = grouped(self.inner_filters, (3, 3), second)(y)
    y = self.norm(act=self.act, name="bn2")(y)
    y = self.conv(self.num_filters, (1, 1), 1, name="conv3")(y)
    return self.norm_add_act("bn3", y, self.apply_shortcut(x), context)


class HighwayBlock(Block):
  """(1 - g) * shortcut + g * F, then ReLU, with g = sigmoid(1x1 conv).

  g is the transform gate and 1 - g the carry gate of Srivastava et al. 2015. F
  is the basic block's branch. He et al. 2016, section 3.1, call this 'exclusive
  gating'. The gate's bias starts at `gate_bias`: the more negative it is, the
  closer the block is to its shortcut.
  """

  gate_bias: float = -2.0

  @nn.compact
  def __call__(self, x: jax.Array, context: Context = NO_CONTEXT) -> jax.Array:
    """See `Block`."""
    y = self.conv(self.inner_filters, (3, 3), self.strides, name="conv1")(x)
    y = self.norm(act=self.act, name="bn1")(y)
    y = self.conv(self.num_filters, (3, 3), 1, name="conv2")(y)
    y = self.norm(name="bn2")(y)
    # This bias does not depend on `model.conv_bias`. Below 0, it keeps the gate
    # nearly shut at first.
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


class PreActBlock(Block):
  """BN-ReLU-3x3, BN-ReLU-3x3, add (He et al. 2016, figure 4e).

  The network's first block does not repeat the stem's BN-ReLU. The shortcut
  takes the block's input unchanged (section 4 and appendix). If a `wide` block
  changes the shape, the shortcut takes the first BN-ReLU's output, as in the
  code of Zagoruyko and Komodakis 2016 and of He et al. 2016.
  """

  wide: bool = False
  dropout: float = 0.0  # Dropped share of the second convolution's input.

  @nn.compact
  def __call__(self, x: jax.Array, context: Context = NO_CONTEXT) -> jax.Array:
    """See `Block`."""
    y = x
    if not self.first_in_network:
      y = self.norm(act=self.act, name="bn1")(y)
    same_shape = self.strides == 1 and x.shape[-1] == self.num_filters
    residual = y if self.wide and not same_shape else x
    y = self.conv(self.inner_filters, (3, 3), self.strides, name="conv1")(y)
    y = self.norm(act=self.act, name="bn2")(y)
    if self.train and self.dropout:
      assert context.key is not None  # Dropout needs it.
      key = jax.random.fold_in(context.key, 1)  # `branch` uses context.key.
      y = nn.Dropout(self.dropout, deterministic=False)(y, rng=key)
    y = self.conv(self.num_filters, (3, 3), 1, name="conv2")(y)
    return self.apply_shortcut(residual) + self.apply_branch(y, context)


class PreActBottleneckBlock(Block):
  """BN-ReLU-1x1, BN-ReLU-3x3, BN-ReLU-1x1, add (He et al. 2016).

  As in the Keras example, the first 1x1 carries the stride, the shortcut takes
  the block's input unchanged, and the first block of the network does not
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


# ---- Blocks and widths, from the configuration and the stem's channels


def num_groups(config: ConfigDict) -> int:
  """The groups of a bottleneck's 3x3 convolution; 0 means the family's."""
  return config.groups or (8 if config.name == "resnext" else 1)


def bottleneck(config: ConfigDict, stem: int) -> BlockAndWidths:
  """Bottlenecks, as wide as in He et al. 2015 and Xie et al. 2017, tables 1."""
  groups = num_groups(config)
  block = functools.partial(
    BottleneckBlock, stride_in_3x3=config.stride_in_3x3, groups=groups
  )
  return block, blocks.doubling(groups * (config.group_width or stem), 4 * stem)


def imagenet(config: ConfigDict, stem: int) -> BlockAndWidths:
  """Basic blocks or bottlenecks, depending on the depth."""
  kind = blocks.basic if config.depth < FIRST_BOTTLENECK else bottleneck
  return kind(config, stem)


def highway(config: ConfigDict, stem: int) -> BlockAndWidths:
  """Highway blocks, as wide as basic blocks."""
  block = functools.partial(HighwayBlock, gate_bias=config.gate_bias)
  return block, blocks.doubling(stem, stem)


def preact(config: ConfigDict, stem: int) -> BlockAndWidths:
  """Pre-activation blocks; wide_resnet widens them by `widen_factor`."""
  wide, dropout = config.name == "wide_resnet", config.block_dropout
  block = functools.partial(PreActBlock, wide=wide, dropout=dropout)
  width = stem * (config.widen_factor if wide else 1)
  return block, blocks.doubling(width, width)


def keras_bottleneck(config: ConfigDict, stem: int) -> BlockAndWidths:
  """The Keras example's v2: a stage's inner width is the width of its input."""
  outer = [stem, *(4 * stem * 2**k for k in range(3))]
  return PreActBottleneckBlock, lambda stage: (outer[stage], outer[stage + 1])
