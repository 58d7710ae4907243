"""Work on all arrays of a tree that stays cheap to compile for deep networks.

A deep network has thousands of arrays. On CPUs, the time that XLA's fusion pass
takes grows with about the third power of the number of reductions in one
computation of a program, and its memory with the square of the number of
operations. So arrays are taken in groups, each of which is a computation of its
own.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

# Arrays of one group. Much larger ones take longer to compile; smaller ones
# are more calls, which in an ordinary network is one.
_GROUP_SIZE = 64
# Modules of one group of `by_modules`.
_MODULES = 16

T = TypeVar("T")
Reduction = Callable[[jax.Array], jax.Array]


def reduce_each(reduction: Reduction, leaves: Sequence[jax.Array]) -> jax.Array:
  """The scalars, [N], that a reduction makes of each of many arrays."""

  def reduce_group(*group):
    return jnp.stack([reduction(leaf) for leaf in group])

  return jnp.concatenate(
    [apart(reduce_group, *group) for group in in_groups(leaves, _GROUP_SIZE)]
  )


def by_modules(
  update: Callable[..., Any],
  grads: dict[str, Any],
  opt_state: Any,
  params: dict[str, Any],
  *others: Any,
) -> tuple[Any, Any]:
  """Updates some modules of a network at a time.

  Right only for an update that looks at each array by itself: it maps (grads,
  opt_state, params, *others) to new parameters and the new state. `grads` and
  `params` are dicts of modules, which stand anywhere in `opt_state` as well.
  """

  def is_like_params(node):
    return isinstance(node, dict) and node.keys() == params.keys()

  def select(tree, names):
    return jax.tree.map(
      lambda node: (
        {name: node[name] for name in names} if is_like_params(node) else node
      ),
      tree,
      is_leaf=is_like_params,
    )

  trees = grads, opt_state, params
  results = [
    apart(update, *(select(tree, names) for tree in trees), *others)
    for names in in_groups(list(params), _MODULES)
  ]

  def merge(node, *parts):
    if not is_like_params(node):
      return parts[0]  # A count, which all have.
    return functools.reduce(operator.or_, parts)

  # Parts end where the whole has something like the parameters.
  return jax.tree.map(
    merge, (params, opt_state), *results, is_leaf=is_like_params
  )


def in_groups(items: Sequence[T], size: int) -> list[Sequence[T]]:
  """Cuts a sequence into pieces of `size`, the last of which may be shorter."""
  return [items[start : start + size] for start in range(0, len(items), size)]


def apart(function: Callable[..., Any], *operands: Any) -> Any:
  """Calls a function of arrays; on CPUs as a computation of its own."""

  def call(*operands):
    # A function that XLA does not inline stays one.
    with set_xla_metadata(inlineable="false"):
      return jax.jit(function)(*operands)

  return lax.platform_dependent(*operands, cpu=call, default=function)
