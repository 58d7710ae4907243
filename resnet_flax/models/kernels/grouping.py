"""Functions of all arrays of a tree that compile fast for deep networks.

A deep network has thousands of arrays. On CPUs, the time of XLA's fusion pass
grows with about the third power of the number of reductions in one computation
of a program, and its memory with the square of the number of operations. So
arrays are divided into groups, and each group is a separate computation.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

# Arrays in a group. Larger groups compile more slowly; smaller ones add calls.
_GROUP_SIZE = 64
_MODULES = 16  # Modules in a group of `by_modules`.


def _in_groups(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
  return [items[start : start + size] for start in range(0, len(items), size)]


def reduce_each(
  reduction: Callable[[jax.Array], jax.Array], leaves: Sequence[jax.Array]
) -> jax.Array:
  """Reduces each of N arrays to a scalar; returns the scalars, [N]."""

  def reduce_group(*group):
    return jnp.stack([reduction(leaf) for leaf in group])

  groups = _in_groups(leaves, _GROUP_SIZE)
  return jnp.concatenate([apart(reduce_group, *group) for group in groups])


def norm_of(x: jax.Array) -> jax.Array:
  """The Euclidean norm, float32[], of an array of any shape.

  x is divided by its largest entry, so squares neither overflow nor all vanish.
  """
  x = x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x))
  has_scale = jnp.isfinite(largest) & (largest > 0)
  scale = jnp.where(has_scale, largest, 1.0)
  return scale * jnp.sqrt(jnp.sum(jnp.square(x / scale)))


def norm(tree: Any) -> jax.Array:
  """The Euclidean norm over all arrays of a tree, float32[]."""
  return norm_of(reduce_each(norm_of, jax.tree.leaves(tree)))


def by_modules(
  update: Callable[..., Any],
  grads: dict[str, Any],
  opt_state: Any,
  params: dict[str, Any],
  *others: Any,
) -> tuple[Any, Any]:
  """Updates the parameters of a network, a group of modules at a time.

  `update` must treat each array separately. It maps (grads, opt_state, params,
  *others) to new parameters and the new state. `grads` and `params` are dicts
  with the same modules as keys; `opt_state` may contain more of these dicts.
  """

  def is_like_params(node):
    return isinstance(node, dict) and node.keys() == params.keys()

  # A dict of modules is a leaf here.
  tree_map = functools.partial(jax.tree.map, is_leaf=is_like_params)

  def select(names, node):
    return {k: node[k] for k in names} if is_like_params(node) else node

  def merge(node, *parts):
    # Other leaves, for example step counts, are the same in all parts.
    distinct = parts if is_like_params(node) else parts[:1]
    return functools.reduce(operator.or_, distinct)

  results = []
  for names in _in_groups(list(params), _MODULES):
    select_group = functools.partial(select, names)
    parts = tree_map(select_group, (grads, opt_state, params))
    results.append(apart(update, *parts, *others))
  return tree_map(merge, (params, opt_state), *results)


def apart(function: Callable[..., Any], *operands: Any) -> Any:
  """Calls a function of arrays; on CPUs it is a separate computation."""

  def call(*operands):
    # XLA does not inline the function, so it stays a separate computation.
    with set_xla_metadata(inlineable="false"):
      return jax.jit(function)(*operands)

  return lax.platform_dependent(*operands, cpu=call, default=function)
