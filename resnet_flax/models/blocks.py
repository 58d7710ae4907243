"""The basic residual block, and the base class of all kinds of blocks.

Source: He et al. 2015 (arXiv:1512.03385). Convolution, normalisation and
activation are injected. `other_blocks` has the other kinds.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

ModuleDef = Callable[..., nn.Module]
Activation = Callable[[jax.Array], jax.Array]

# 'keras', 'A' and 'B' are the identity in blocks that keep the shape; 'C' is a
# 1x1 convolution with BN in every block (He et al. 2015, section 4.1).
SHORTCUTS = ("keras", "A", "B", "C")


def subsample_and_pad(
  x: jax.Array, strides: int, num_filters: int
) -> jax.Array:
  """The parameter-free shortcut: option A of He et al. 2015, section 3.3.

  New channels are zero: half come before the old channels, half after them.

  Returns:
    float[B, ceil(H / strides), ceil(W / strides), num_filters].
  """
  x = x[:, ::strides, ::strides]
  missing = num_filters - x.shape[-1]
  before = missing // 2
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, missing - before)))


class Context(NamedTuple):
  """Values that a block may use besides its input; each block has its own."""

  # key[] for random draws in training; None elsewhere.
  key: jax.Array | None = None
  # float32[] in (0, 1]: l / L for block l of L, counted from 1.
  fraction: jax.Array | None = None


NO_CONTEXT = Context()


class Block(nn.Module):
  """The base class of blocks; a subclass defines the forward pass.

  A block is called with float[B, H, W, C]. A block that draws random numbers,
  or depends on its position, also needs a `Context`. The blocks of a loop
  (`model.scan`) may differ only in their names, variables and contexts.
  """

  inner_filters: int  # Channels inside the block.
  num_filters: int  # Channels of the output.
  strides: int  # Stride of one convolution and of the shortcut.
  first_in_network: bool  # Whether the block follows the stem.
  conv: ModuleDef
  norm: ModuleDef
  act: Activation
  shortcut: str  # One of `SHORTCUTS`, or 'none' for a plain network.
  train: bool = False
  # Changes the branch before the sum, for example drops or scales it. It is
  # called as branch(train=..., name=...)(y, context). None changes nothing.
  branch: ModuleDef | None = None

  def apply_shortcut(self, x: jax.Array) -> jax.Array:
    """The block's input, in the shape of the block's output."""
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
    """The branch y, changed by `branch` if the block has one."""
    if self.branch is None:
      return y
    return self.branch(train=self.train, name="branch")(y, context)

  def norm_add_act(
    self, name: str, y: jax.Array, residual: jax.Array | None, context: Context
  ) -> jax.Array:
    """act(residual + branch(norm(y))), in one pass if there is no `branch`."""
    if self.branch is None:
      return self.norm(act=self.act, name=name)(y, residual)
    y = self.apply_branch(self.norm(name=name)(y), context)
    return self.act(y if residual is None else residual + y)


class BasicBlock(Block):
  """conv-BN-ReLU, conv-BN, add, ReLU (He et al. 2015, figure 2).

  Without a shortcut it is two layers of the plain network (section 4.2).
  """

  @nn.compact
  def __call__(self, x: jax.Array, context: Context = NO_CONTEXT) -> jax.Array:
    """See `Block`."""
    y = self.conv(self.inner_filters, (3, 3), self.strides, name="conv1")(x)
    y = self.norm(act=self.act, name="bn1")(y)
    y = self.conv(self.num_filters, (3, 3), 1, name="conv2")(y)
    residual = None if self.shortcut == "none" else self.apply_shortcut(x)
    return self.norm_add_act("bn2", y, residual, context)


# ---- Blocks and widths, from the configuration

# Maps a stage's number, from 0, to its (inner, outer) channels.
Widths = Callable[[int], tuple[int, int]]
BlockAndWidths = tuple[Callable[..., Block], Widths]


def doubling(inner: int, outer: int) -> Widths:
  """The given channels in the first stage; every later stage doubles them."""
  return lambda stage: (inner * 2**stage, outer * 2**stage)


def basic(config: ConfigDict, stem: int) -> BlockAndWidths:
  """Basic blocks; the first stage has as many channels as the stem."""
  return BasicBlock, doubling(stem, stem)
