"""Residual networks for small images: one forward pass, two kinds of block.

v1 is He et al. 2015 (arXiv:1512.03385), section 4.2; v2 is He et al. 2016
(arXiv:1603.05027) with bottlenecks, both in the layout of the Keras CIFAR-10
example. Convolution, normalisation and activation are injected, so a variant
is a different argument and not a different forward pass.
"""

import functools
import operator
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from resnet_flax.models.batch_norm import Activation

ModuleDef = Callable[..., nn.Module]


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
  """What every residual block is told; subclasses say what it computes.

  Attributes:
    inner_filters: channels inside the block.
    num_filters: channels that come out.
    strides: of the block's first convolution and of its shortcut.
    first_in_network: whether the block follows the stem.
    conv, norm, act: what to build it from.
    shortcut: 'keras' or 'A', used where the shape changes.
  """

  inner_filters: int
  num_filters: int
  strides: int
  first_in_network: bool
  conv: ModuleDef
  norm: ModuleDef
  act: Activation
  shortcut: str

  def project(self, x: jax.Array) -> jax.Array:
    """Brings the block's input to the shape of its output."""
    if self.strides == 1 and x.shape[-1] == self.num_filters:
      return x
    if self.shortcut == "A":
      return subsample_and_pad(x, self.strides, self.num_filters)
    return self.conv(
      self.num_filters, (1, 1), self.strides, name="shortcut_conv"
    )(x)


class BasicBlock(Block):
  """conv-BN-ReLU, conv-BN, add, ReLU (He et al. 2015, figure 2)."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps float[B, H, W, C] to the block's output."""
    y = self.conv(self.inner_filters, (3, 3), self.strides, name="conv1")(x)
    y = self.norm(act=self.act, name="bn1")(y)
    y = self.conv(self.num_filters, (3, 3), 1, name="conv2")(y)
    return self.norm(act=self.act, name="bn2")(y, self.project(x))


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
    return self.project(x) + y


def run_as_loop(
  blocks: Sequence[Block], x: jax.Array, *, remat: bool
) -> jax.Array:
  """Applies blocks one after the other as the one body of a loop.

  The blocks keep their variables under their own names: they are stacked for
  the loop alone, and new running statistics are handed back to each.

  Args:
    blocks: bound blocks that differ in nothing but their names and variables
      and change neither the shape nor the dtype of x.
    x: float[B, H, W, C].
    remat: keep only each block's input for the backward pass.

  Returns:
    Like x.
  """
  # In the loop's body there is no module to belong to.
  detached = blocks[0].copy(parent=None)
  mutable = [
    name for name in ["batch_stats"] if blocks[0].is_mutable_collection(name)
  ]

  def body(x, variables):
    return detached.apply(variables, x, mutable=mutable)

  if remat:
    # XLA does not share results between the forward and the backward loop, so
    # nothing need keep it from doing so.
    body = jax.checkpoint(body, prevent_cse=False)
  stacked = jax.tree.map(
    lambda *leaves: jnp.stack(leaves), *(block.variables for block in blocks)
  )
  x, updated = lax.scan(body, x, stacked)
  for k, block in enumerate(blocks):
    new = jax.tree.map(operator.itemgetter(k), updated)
    for layer, statistics in new.get("batch_stats", {}).items():
      block.put_variable("batch_stats", layer, statistics)
  return x


@nn.remat
def _run_with_remat(block: Block, x: jax.Array) -> jax.Array:
  return block(x)


class ResNet(nn.Module):
  """Stem, stages of residual blocks, average pool, dense head.

  Attributes:
    stage_sizes: blocks of each stage; all stages but the first halve the
      resolution.
    stage_filters: (inner, outer) channels of each stage's blocks.
    stem_filters: channels of the 3x3 stem.
    num_classes: size of the head.
    block_cls: the kind of block.
    final_norm_act: BN-ReLU before the pool, which pre-activation needs.
    conv, norm, dense: partials; `norm` also takes `use_running_average` and
      `act`, and what it makes is called with x and, where there is one, the
      residual.
    act: the activation function.
    shortcut: 'keras' or 'A'.
    remat: keep only each block's input for the backward pass, which computes
      the block again. On a CPU, XLA computes it again too early to need less
      memory, except in a loop.
    scan: run those blocks of a stage that are alike, all but its first, as
      one loop. Variables are the same and have the same names.
  """

  stage_sizes: Sequence[int]
  stage_filters: Sequence[tuple[int, int]]
  stem_filters: int
  num_classes: int
  block_cls: type[Block]
  final_norm_act: bool
  conv: ModuleDef
  norm: ModuleDef
  dense: ModuleDef
  act: Activation = nn.relu
  shortcut: str = "keras"
  remat: bool = False
  scan: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Classifies normalised images.

    Args:
      images: float[B, H, W, C], 32x32 in the recipe.
      train: batch statistics (updating `batch_stats`) or running ones.

    Returns:
      float32[B, num_classes] logits.
    """
    norm = functools.partial(self.norm, use_running_average=not train)
    x = self.conv(self.stem_filters, (3, 3), 1, name="stem_conv")(images)
    x = norm(act=self.act, name="stem_bn")(x)
    # Initialisation has no backward pass, and a loop cannot make variables.
    remat = self.remat and not self.is_initializing()
    scan = self.scan and not self.is_initializing()
    stages = zip(self.stage_sizes, self.stage_filters, strict=True)
    for stage, (num_blocks, (inner_filters, num_filters)) in enumerate(stages):
      blocks = [
        self.block_cls(
          inner_filters=inner_filters,
          num_filters=num_filters,
          strides=2 if stage > 0 and block == 0 else 1,
          first_in_network=stage == 0 and block == 0,
          conv=self.conv,
          norm=norm,
          act=self.act,
          shortcut=self.shortcut,
          name=f"stage{stage + 1}_block{block + 1}",
        )
        for block in range(num_blocks)
      ]
      # All but the first are alike; a loop of one would only be slower.
      num_unrolled = 1 if scan and num_blocks > 2 else num_blocks
      for block in blocks[:num_unrolled]:
        x = _run_with_remat(block, x) if remat else block(x)
      if blocks[num_unrolled:]:
        x = run_as_loop(blocks[num_unrolled:], x, remat=remat)
    if self.final_norm_act:
      x = norm(act=self.act, name="final_bn")(x)
    x = jnp.mean(x, axis=(1, 2))
    return self.dense(self.num_classes, name="head")(x).astype(jnp.float32)
