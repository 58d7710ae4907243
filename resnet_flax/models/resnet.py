"""Residual networks: one forward pass for every kind of stem and block.

The layout follows He et al. 2015 (arXiv:1512.03385), sections 3.3 and 4.2, and
the Keras CIFAR-10 example. Stem, block, convolution, normalisation and
activation are injected: a variant changes arguments and not the forward pass.
Blocks without a shortcut make a plain network.
"""

import functools
import operator
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_flax.models import layers
from resnet_flax.models.blocks import Activation, Block, Context, ModuleDef
from resnet_flax.models.kernels.loop import run_as_loop, run_with_remat


class ResNet(nn.Module):
  """Stem, stages of residual blocks, average pool, dense head.

  `conv`, `norm` and `dense` make layers. `norm` takes `use_running_average` and
  `act`; the layer it makes is called with x, or with x and a residual.
  """

  stage_sizes: Sequence[int]  # Blocks per stage; later stages halve H and W.
  stage_filters: Sequence[tuple[int, int]]  # (inner, outer) of each stage.
  stem: Callable[..., jax.Array]  # See `stems`.
  stem_filters: int
  num_classes: int
  block_cls: Callable[..., Block]
  final_norm_act: bool  # BN-ReLU before the pool, as pre-activation needs.
  conv: ModuleDef
  norm: ModuleDef
  dense: ModuleDef
  shortcut: str  # One of `blocks.SHORTCUTS`, or 'none' for a plain network.
  input_size: int  # See `layers.resize`.
  act: Activation = nn.relu
  # Keep only each block's input for the backward pass, which computes the block
  # again. On a CPU this saves memory only with `scan`: outside a loop, XLA
  # computes the block again too early.
  remat: bool = False
  # Run a stage's blocks as one loop, except the first, which differs. Variables
  # and their names stay the same.
  scan: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """float32[B, num_classes] logits of normalised float[B, H, W, C] images.

    In training, batch norms use the batch's statistics and update the running
    statistics in `batch_stats`; otherwise they use the running statistics.
    """
    norm = functools.partial(self.norm, use_running_average=not train)
    x = self.stem(
      layers.resize(images, self.input_size),
      self.stem_filters,
      conv=self.conv,
      norm=functools.partial(norm, act=self.act),
    )
    # Initialisation has no backward pass, and a loop cannot make variables.
    remat = self.remat and not self.is_initializing()
    scan = self.scan and not self.is_initializing()
    contexts = self._contexts(train)
    first = 0  # The index of the stage's first block among all blocks.
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
          train=train,
          name=f"stage{stage + 1}_block{block + 1}",
        )
        for block in range(num_blocks)
      ]
      # All but the first are alike; a loop of one would only be slower.
      num_unrolled = 1 if scan and num_blocks > 2 else num_blocks
      for k, block in enumerate(blocks[:num_unrolled]):
        context = jax.tree.map(operator.itemgetter(first + k), contexts)
        x = run_with_remat(block, x, context) if remat else block(x, context)
      if blocks[num_unrolled:]:
        rest = slice(first + num_unrolled, first + num_blocks)
        context = jax.tree.map(operator.itemgetter(rest), contexts)
        x = run_as_loop(blocks[num_unrolled:], x, context, remat=remat)
      first += num_blocks
    if self.final_norm_act:
      x = norm(act=self.act, name="final_bn")(x)
    x = jnp.mean(x, axis=(1, 2))
    return self.dense(self.num_classes, name="head")(x).astype(jnp.float32)

  def _contexts(self, train: bool) -> Context:
    """All blocks' contexts, stacked along a leading axis."""
    count = sum(self.stage_sizes)
    keys = None
    if train and self.has_rng("dropout"):
      keys = jax.random.split(self.make_rng("dropout"), count)
    return Context(keys, jnp.arange(1, count + 1, dtype=jnp.float32) / count)
