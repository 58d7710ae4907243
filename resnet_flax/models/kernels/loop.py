"""Runs blocks in a loop, or recomputes their values for the gradient."""

import operator
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any


def run_as_loop(
  blocks: Sequence[nn.Module], x: jax.Array, contexts: PyTree, *, remat: bool
) -> jax.Array:
  """Applies blocks to x, float[B, H, W, C], one after the other, in a loop.

  The blocks must be bound, may differ only in names and variables, and must
  keep the shape and dtype of x. Variables keep their names: they are stacked
  only for the loop, and new values, for example running statistics, are written
  back to their block. `contexts` has a leading axis of blocks. With `remat`,
  only each block's input is kept for the backward pass.
  """
  # The loop's body has no parent module.
  detached = blocks[0].copy(parent=None)
  assert blocks[0].scope is not None  # They are bound.
  mutable = blocks[0].scope.mutable or []

  def body(x, of_block):
    variables, context = of_block
    return detached.apply(variables, x, context, mutable=mutable)

  if remat:
    # XLA never shares results between the forward and the backward loop, so
    # sharing need not be prevented.
    body = jax.checkpoint(body, prevent_cse=False)
  stacked = jax.tree.map(
    lambda *leaves: jnp.stack(leaves), *(block.variables for block in blocks)
  )
  x, updated = lax.scan(body, x, (stacked, contexts))
  for k, block in enumerate(blocks):
    new = jax.tree.map(operator.itemgetter(k), updated)
    for collection, layers in new.items():
      for layer, values in layers.items():
        block.put_variable(collection, layer, values)
  return x


@nn.remat
def run_with_remat(
  block: nn.Module, x: jax.Array, context: PyTree
) -> jax.Array:
  """Applies a block; the backward pass computes its inner values again."""
  return block(x, context)
