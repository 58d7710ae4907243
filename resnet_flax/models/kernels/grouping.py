"""Work on all arrays of a tree that stays cheap to compile for deep networks.

A deep network has thousands of arrays. On CPUs, the time that XLA's fusion pass
takes grows with about the third power of the reductions in one computation of a
program, and its memory with the square of the operations. So arrays are taken
in groups, each of which is a computation of its own.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

# Arrays of one group. Much larger ones take longer to compile; smaller ones
# are more calls, which in an ordinary network is one.
_GROUP_SIZE = 64
_MODULES = 16  # Of one group of `by_modules`.


def _in_groups(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
  return [items[start : start + size] for start in range(0, len(items), size)]


def reduce_each(
  reduction: Callable[[jax.Array], jax.Array], leaves: Sequence[jax.Array]
) -> jax.Array:
  """The scalars, [N], that a reduction makes of each of many arrays."""

  def reduce_group(*group):
    return jnp.stack([reduction(leaf) for leaf in group])

  groups = _in_groups(leaves, _GROUP_SIZE)
  return jnp.concatenate([apart(reduce_group, *group) for group in groups])


def norm(tree: Any) -> jax.Array:
  """The Euclidean norm over all arrays of a tree, float32[]."""
  squares = reduce_each(lambda x: jnp.sum(jnp.square(x)), jax.tree.leaves(tree))
  return jnp.sqrt(jnp.sum(squares))


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

  # Trees end where there is something like the parameters.
  tree_map = functools.partial(jax.tree.map, is_leaf=is_like_params)

  def select(names, node):
    return {k: node[k] for k in names} if is_like_params(node) else node

  def merge(node, *parts):
    # What is not like the parameters is a count, which all parts have.
    distinct = parts if is_like_params(node) else parts[:1]
    return functools.reduce(operator.or_, distinct)

  results = []
  for names in _in_groups(list(params), _MODULES):
    of_names = functools.partial(select, names)
    parts = tree_map(of_names, (grads, opt_state, params))
    results.append(apart(update, *parts, *others))
  return tree_map(merge, (params, opt_state), *results)


def apart(function: Callable[..., Any], *operands: Any) -> Any:
  """Calls a function of arrays; on CPUs as a computation of its own."""

  def call(*operands):
    # A function that XLA does not inline stays one.
    with set_xla_metadata(inlineable="false"):
      return jax.jit(function)(*operands)

  return lax.platform_dependent(*operands, cpu=call, default=function)
