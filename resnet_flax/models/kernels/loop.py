"""Blocks that are run as a loop, or computed again: for deep networks."""

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
  """Applies blocks one after the other as the one body of a loop.

  The blocks keep their variables under their own names: they are stacked for
  the loop alone, and what was written to their collections, such as new running
  statistics, is handed back to each.

  Args:
    blocks: bound blocks that differ in nothing but their names and variables
      and change neither the shape nor the dtype of x.
    x: float[B, H, W, C].
    contexts: of all blocks, with a leading axis of blocks.
    remat: keep only each block's input for the backward pass.
  """
  # In the loop's body there is no module to belong to.
  detached = blocks[0].copy(parent=None)
  assert blocks[0].scope is not None  # They are bound.
  mutable = blocks[0].scope.mutable or []

  def body(x, of_block):
    variables, context = of_block
    return detached.apply(variables, x, context, mutable=mutable)

  if remat:
    # XLA does not share results between the forward and the backward loop, so
    # nothing need keep it from doing so.
    body = jax.checkpoint(body, prevent_cse=False)
  stacked = jax.tree.map(
    lambda *leaves: jnp.stack(leaves), *(block.variables for block in blocks)
  )
  x, updated = lax.scan(body, x, (stacked, contexts))
  for k, block in enumerate(blocks):
    new = jax.tree.map(operator.itemgetter(k), updated)
    for collection, written in new.items():
      for layer, values in written.items():
        block.put_variable(collection, layer, values)
  return x


@nn.remat
def run_with_remat(
  block: nn.Module, x: jax.Array, context: PyTree
) -> jax.Array:
  """Applies a block whose inside the backward pass computes again."""
  return block(x, context)
