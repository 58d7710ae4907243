"""The kinds of residual block, and the shortcuts that they can have.

He et al. 2015 (arXiv:1512.03385) is the source of the blocks that activate
after the sum, He et al. 2016 (arXiv:1603.05027) of those that activate before
their convolutions, Srivastava et al. 2015 (arXiv:1505.00387) of the gates.
Convolution, normalisation and activation are injected.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

ModuleDef = Callable[..., nn.Module]
Activation = Callable[[jax.Array], jax.Array]

# 'keras', 'A' and 'B' differ where a block changes the shape, and are the
# identity elsewhere; 'C' projects everywhere (He et al. 2015, section 3.3).
SHORTCUTS = ("keras", "A", "B", "C")


def subsample_and_pad(
  x: jax.Array, strides: int, num_filters: int
) -> jax.Array:
  """The parameter-free shortcut: option A of He et al. 2015, section 3.3.

  New channels are zero, half of them before and half after the old ones.

  Returns:
    float[B, ceil(H / strides), ceil(W / strides), num_filters].
  """
  x = x[:, ::strides, ::strides]
  missing = num_filters - x.shape[-1]
  before = missing // 2
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, missing - before)))


class Context(NamedTuple):
  """What a block may use besides its input; differs from block to block."""

  # key[] for random draws in training; None elsewhere.
  key: jax.Array | None = None
  # float32[] in (0, 1]: the block's number, from 1, over the number of blocks.
  fraction: jax.Array | None = None


_NO_CONTEXT = Context()


class Block(nn.Module):
  """What every block is told; subclasses say what it computes.

  A block is called with float[B, H, W, C] and, where something in it draws or
  depends on how deep it lies, a `Context`. In a loop (`model.scan`) blocks may
  differ in nothing else.
  """

  inner_filters: int  # Channels inside the block.
  num_filters: int  # Channels that come out.
  strides: int  # Of one of the block's convolutions and of its shortcut.
  first_in_network: bool  # Whether the block follows the stem.
  conv: ModuleDef
  norm: ModuleDef
  act: Activation
  shortcut: str  # One of `SHORTCUTS`, or 'none' for a plain network.
  train: bool = False
  # Changes the branch before the sum: called as branch(train=..., name=...)
  # (y, context), for example to drop or to scale it. None: nothing.
  branch: ModuleDef | None = None

  def apply_shortcut(self, x: jax.Array) -> jax.Array:
    """The block's input in the shape of its output."""
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

  def apply_branch(self, y: jax.Array, context: Context) -> jax.Array:
    """The branch as it is added to the shortcut."""
    if self.branch is None:
      return y
    return self.branch(train=self.train, name="branch")(y, context)

  def norm_add_act(
    self, name: str, y: jax.Array, residual: jax.Array | None, context: Context
  ) -> jax.Array:
    """act(residual + branch(norm(y))), in one pass where nothing is between."""
    if self.branch is None:
      return self.norm(act=self.act, name=name)(y, residual)
    y = self.apply_branch(self.norm(name=name)(y), context)
    return self.act(y if residual is None else residual + y)


class BasicBlock(Block):
  """conv-BN-ReLU, conv-BN, add, ReLU (He et al. 2015, figure 2).

  Without a shortcut it is two layers of the plain network (section 4.2).
  """

  @nn.compact
  def __call__(self, x: jax.Array, context: Context = _NO_CONTEXT) -> jax.Array:
    """See `Block`."""
    y = self.conv(self.inner_filters, (3, 3), self.strides, name="conv1")(x)
    y = self.norm(act=self.act, name="bn1")(y)
    y = self.conv(self.num_filters, (3, 3), 1, name="conv2")(y)
    residual = None if self.shortcut == "none" else self.apply_shortcut(x)
    return self.norm_add_act("bn2", y, residual, context)


class BottleneckBlock(Block):
  """1x1, 3x3, 1x1, each with BN, add, ReLU (He et al. 2015, figure 5).

  With `stride_in_3x3` the 3x3 convolution carries the stride, as in torchvision
  ('ResNet v1.5'); otherwise the first 1x1 does, as in the paper.
  """

  stride_in_3x3: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, context: Context = _NO_CONTEXT) -> jax.Array:
    """See `Block`."""
    first, second = self.strides, 1
    if self.stride_in_3x3:
      first, second = second, first
    y = self.conv(self.inner_filters, (1, 1), first, name="conv1")(x)
    y = self.norm(act=self.act, name="bn1")(y)
    y = self.conv(self.inner_filters, (3, 3), second, name="conv2")(y)
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
  def __call__(self, x: jax.Array, context: Context = _NO_CONTEXT) -> jax.Array:
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
  shortcut takes the block's input as it comes (section 4 and appendix).
  """

  @nn.compact
  def __call__(self, x: jax.Array, context: Context = _NO_CONTEXT) -> jax.Array:
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
  def __call__(self, x: jax.Array, context: Context = _NO_CONTEXT) -> jax.Array:
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
