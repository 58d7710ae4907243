"""The other residual blocks; see `blocks` for what they share.

Sources: He et al. 2015 (arXiv:1512.03385) and, with groups, Xie et al. 2017
(arXiv:1611.05431) of bottlenecks; Srivastava et al. 2015 (arXiv:1505.00387) of
gates; He et al. 2016 (arXiv:1603.05027) of blocks that activate before their
convolutions, Zagoruyko and Komodakis 2016 (arXiv:1605.07146) of wide ones.
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from resnet_flax.models import blocks
from resnet_flax.models.blocks import NO_CONTEXT, Block, Context, Kind

# He et al. 2015, table 1: for each depth the blocks of each stage, which are
# bottlenecks from 50 layers on.
FIRST_BOTTLENECK = 50
IMAGENET_SIZES: Mapping[int, tuple[int, ...]] = {
  18: (2, 2, 2, 2),
  34: (3, 4, 6, 3),
  50: (3, 4, 6, 3),
  101: (3, 4, 23, 3),
  152: (3, 8, 36, 3),
}


class BottleneckBlock(Block):
  """1x1, 3x3, 1x1, each with BN, add, ReLU (He et al. 2015, figure 5).

  With `stride_in_3x3` the 3x3 convolution carries the stride, as in torchvision
  ('ResNet v1.5'); otherwise the first 1x1 does, as in the paper. With several
  `groups` of its channels it is ResNeXt's (Xie et al. 2017, figure 3c).
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


class PreActBlock(Block):
  """BN-ReLU-3x3, BN-ReLU-3x3, add (He et al. 2016, figure 4e).

  The first block of the network does not repeat the stem's BN-ReLU, and the
  shortcut takes the block's input as it comes (section 4 and appendix). That of
  a `wide` one (Zagoruyko and Komodakis 2016, figure 1d, and their code) takes
  what the first BN-ReLU gives where the shape changes.
  """

  wide: bool = False
  dropout: float = 0.0  # Of the second convolution's input.

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
      assert context.key is not None  # In training.
      key = jax.random.fold_in(context.key, 1)  # It itself is the branch's.
      y = nn.Dropout(self.dropout, deterministic=False)(y, rng=key)
    y = self.conv(self.num_filters, (3, 3), 1, name="conv2")(y)
    return self.apply_shortcut(residual) + self.apply_branch(y, context)


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


# ---- By the configuration and the channels of the stem


def num_groups(config: ConfigDict) -> int:
  """The groups of a bottleneck's 3x3 convolution: as asked for, or usual."""
  return config.groups or (8 if config.name == "resnext" else 1)


def bottleneck(config: ConfigDict, stem: int) -> Kind:
  """He et al. 2015, table 1; of several groups Xie et al. 2017, table 1."""
  groups = num_groups(config)
  block = functools.partial(
    BottleneckBlock, stride_in_3x3=config.stride_in_3x3, groups=groups
  )
  return block, blocks.doubling(groups * (config.group_width or stem), 4 * stem)


def imagenet(config: ConfigDict, stem: int) -> Kind:
  """Basic blocks or bottlenecks, by the depth."""
  kind = blocks.basic if config.depth < FIRST_BOTTLENECK else bottleneck
  return kind(config, stem)


def highway(config: ConfigDict, stem: int) -> Kind:
  """As wide as basic blocks."""
  block = functools.partial(HighwayBlock, gate_bias=config.gate_bias)
  return block, blocks.doubling(stem, stem)


def preact(config: ConfigDict, stem: int, wide: bool = False) -> Kind:
  """As wide as basic blocks, or `widen_factor` times as wide."""
  dropout = config.block_dropout
  block = functools.partial(PreActBlock, wide=wide, dropout=dropout)
  width = stem * (config.widen_factor if wide else 1)
  return block, blocks.doubling(width, width)


def keras_bottleneck(config: ConfigDict, stem: int) -> Kind:
  """The Keras example's v2: a stage is as wide inside as its input is."""
  outer = [stem, *(4 * stem * 2**k for k in range(3))]
  return PreActBottleneckBlock, lambda stage: (outer[stage], outer[stage + 1])
