"""The block of deep networks for large images, and of ResNeXt."""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from resnet_flax.models import blocks
from resnet_flax.models.blocks import NO_CONTEXT, Block, Context

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


# ---- By the configuration


def bottleneck(
  config: ConfigDict, stem: int, groups: int = 1
) -> tuple[blocks.BlockDef, blocks.Widths]:
  """He et al. 2015, table 1; of several groups Xie et al. 2017, table 1."""
  groups = config.groups or groups
  block = functools.partial(
    BottleneckBlock, stride_in_3x3=config.stride_in_3x3, groups=groups
  )
  inner = groups * (config.group_width or stem)
  return block, blocks.doubling(inner, 4 * stem)


def imagenet(
  config: ConfigDict, stem: int
) -> tuple[blocks.BlockDef, blocks.Widths]:
  """Basic blocks or bottlenecks, by the depth."""
  kind = blocks.basic if config.depth < FIRST_BOTTLENECK else bottleneck
  return kind(config, stem)
