"""The kinds of residual block, and the shortcuts that they can have.

He et al. 2015 (arXiv:1512.03385) is the source of the blocks that activate
after the sum, He et al. 2016 (arXiv:1603.05027) of those that activate before
their convolutions, Srivastava et al. 2015 (arXiv:1505.00387) of the gates.
Convolution, normalisation and activation are injected.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_flax.models.kernels.batch_norm import Activation

ModuleDef = Callable[..., nn.Module]

# 'keras', 'A' and 'B' differ where a block changes the shape, and are the
# identity elsewhere; 'C' projects everywhere (He et al. 2015, section 3.3).
SHORTCUTS = ("keras", "A", "B", "C")


def subsample_and_pad(
  x: jax.Array, strides: int, num_filters: int
) -> jax.Array:
  """The parameter-free shortcut: option A of He et al. 2015, section 3.3.

  Args:
    x: float[B, H, W, C].
    strides: every how many pixels one is kept.
    num_filters: channels of the result; the new ones are zero, half of them
      before and half after the old ones.

  Returns:
    float[B, ceil(H / strides), ceil(W / strides), num_filters].
  """
  x = x[:, ::strides, ::strides]
  missing = num_filters - x.shape[-1]
  before = missing // 2
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, missing - before)))


class Block(nn.Module):
  """What every block is told; subclasses say what it computes.

  Attributes:
    inner_filters: channels inside the block.
    num_filters: channels that come out.
    strides: of one of the block's convolutions and of its shortcut.
    first_in_network: whether the block follows the stem.
    conv, norm, act: what to build it from.
    shortcut: one of `SHORTCUTS`, or 'none' for a plain network.
  """

  inner_filters: int
  num_filters: int
  strides: int
  first_in_network: bool
  conv: ModuleDef
  norm: ModuleDef
  act: Activation
  shortcut: str

  def bring(self, x: jax.Array) -> jax.Array:
    """The block's input in the shape of its output, by its shortcut."""
    same_shape = self.strides == 1 and x.shape[-1] == self.num_filters
    if same_shape and self.shortcut != "C":
      return x
    if self.shortcut == "A":
      return subsample_and_pad(x, self.strides, self.num_filters)
    x = self.conv(self.num_filters, (1, 1), self.strides, name="shortcut_conv")(
      x
    )
    if self.shortcut == "keras":
      return x
    return self.norm(name="shortcut_bn")(x)


class BasicBlock(Block):
  """conv-BN-ReLU, conv-BN, add, ReLU (He et al. 2015, figure 2).

  Without a shortcut it is two layers of the plain network (section 4.2).
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, C] to the block's output."""
    y = self.conv(self.inner_filters, (3, 3), self.strides, name="conv1")(x)
    y = self.norm(act=self.act, name="bn1")(y)
    y = self.conv(self.num_filters, (3, 3), 1, name="conv2")(y)
    residual = None if self.shortcut == "none" else self.bring(x)
    return self.norm(act=self.act, name="bn2")(y, residual)


class BottleneckBlock(Block):
  """1x1, 3x3, 1x1, each with BN, add, ReLU (He et al. 2015, figure 5).

  Attributes:
    stride_in_3x3: the 3x3 convolution carries the stride, as in torchvision
      ('ResNet v1.5'); otherwise the first 1x1 does, as in the paper.
  """

  stride_in_3x3: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, C] to the block's output."""
    first, second = self.strides, 1
    if self.stride_in_3x3:
      first, second = second, first
    y = self.conv(self.inner_filters, (1, 1), first, name="conv1")(x)
    y = self.norm(act=self.act, name="bn1")(y)
    y = self.conv(self.inner_filters, (3, 3), second, name="conv2")(y)
    y = self.norm(act=self.act, name="bn2")(y)
    y = self.conv(self.num_filters, (1, 1), 1, name="conv3")(y)
    return self.norm(act=self.act, name="bn3")(y, self.bring(x))


class HighwayBlock(Block):
  """(1 - g) * shortcut + g * F, then ReLU, with g = sigmoid(1x1 conv).

  g is the transform gate and 1 - g the carry gate of Srivastava et al. 2015,
  F the basic block's two convolutions: 'exclusive gating' of He et al. 2016,
  section 3.1.

  Attributes:
    gate_bias: where the gate's bias starts; the more negative, the nearer is
      the block to its shortcut.
  """

  gate_bias: float = -2.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, C] to the block's output."""
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
    return self.act((1 - gate) * self.bring(x) + gate * y)


class PreActBlock(Block):
  """BN-ReLU-3x3, BN-ReLU-3x3, add (He et al. 2016, figure 4e).

  The first block of the network does not repeat the stem's BN-ReLU, and the
  shortcut takes the block's input as it comes (section 4 and appendix).
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, C] to the block's output."""
    y = x
    if not self.first_in_network:
      y = self.norm(act=self.act, name="bn1")(y)
    y = self.conv(self.inner_filters, (3, 3), self.strides, name="conv1")(y)
    y = self.norm(act=self.act, name="bn2")(y)
    y = self.conv(self.num_filters, (3, 3), 1, name="conv2")(y)
    return self.bring(x) + y


class PreActBottleneckBlock(Block):
  """BN-ReLU-1x1, BN-ReLU-3x3, BN-ReLU-1x1, add (He et al. 2016).

  As in the Keras example the first 1x1 carries the stride, the shortcut takes
  the block's input as it comes, and the first block of the network does not
  repeat the stem's BN-ReLU.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, C] to the block's output."""
    y = x
    if not self.first_in_network:
      y = self.norm(act=self.act, name="bn1")(y)
    y = self.conv(self.inner_filters, (1, 1), self.strides, name="conv1")(y)
    y = self.norm(act=self.act, name="bn2")(y)
    y = self.conv(self.inner_filters, (3, 3), 1, name="conv2")(y)
    y = self.norm(act=self.act, name="bn3")(y)
    y = self.conv(self.num_filters, (1, 1), 1, name="conv3")(y)
    return self.bring(x) + y
