"""Sums over all arrays of a tree that stay cheap to compile for deep networks.

A deep network has thousands of arrays. On CPUs, the time and the memory that
XLA's fusion pass takes grow with about the third power of the number of
reductions in one computation of a program, and those over all weights were
nearly all of what compiling a step of a 326-layer network took.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

# Arrays of one group. Much larger ones take longer to compile; smaller ones
# are more calls, which in an ordinary network is one.
_GROUP_SIZE = 64

Reduction = Callable[[jax.Array], jax.Array]


def reduce_each(reduction: Reduction, leaves: Sequence[jax.Array]) -> jax.Array:
  """What a reduction makes of each of many arrays.

  Args:
    reduction: maps an array to a scalar, [].
    leaves: any shapes, at least one.

  Returns:
    The scalars, [N], in the order of the leaves.
  """
  groups = [
    leaves[start : start + _GROUP_SIZE]
    for start in range(0, len(leaves), _GROUP_SIZE)
  ]
  return jnp.concatenate([_reduce_group(reduction, group) for group in groups])


def _reduce_group(
  reduction: Reduction, leaves: Sequence[jax.Array]
) -> jax.Array:
  return lax.platform_dependent(
    *leaves,
    cpu=functools.partial(_reduce_apart, reduction),
    default=functools.partial(_reduce_here, reduction),
  )


def _reduce_apart(reduction: Reduction, *leaves: jax.Array) -> jax.Array:
  # A function that XLA does not inline is a computation of its own.
  with set_xla_metadata(inlineable="false"):
    return jax.jit(functools.partial(_reduce_here, reduction))(*leaves)


def _reduce_here(reduction: Reduction, *leaves: jax.Array) -> jax.Array:
  return jnp.stack([reduction(leaf) for leaf in leaves])
