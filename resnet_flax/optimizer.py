"""The optimizer: coupled L2, then Adam or momentum, then the learning rate."""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from resnet_flax.models.kernels import grouping as leaves
from resnet_flax.run import errors

PyTree = Any

NAMES = ("adam", "sgd")

# Modules that are updated by one computation, on CPUs.
_GROUP_SIZE = 16


def _is_conv_kernel(path: tuple[Any, ...], leaf: Any) -> bool:
  return path[-1].key == "kernel" and leaf.ndim == 4


def _conv_kernels(params: PyTree) -> PyTree:
  return jax.tree_util.tree_map_with_path(_is_conv_kernel, params)


def _kernels(params: PyTree) -> PyTree:
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key == "kernel", params
  )


def _all_weights(params: PyTree) -> PyTree:
  return jax.tree.map(lambda _: True, params)


L2_WEIGHTS = {
  "conv_kernels": _conv_kernels,
  "kernels": _kernels,
  "all": _all_weights,
}


def _scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
  """Descends at the rate handed to `update`.

  The rate also depends on the plateau and warm-up state and is logged; given
  from outside, it is computed in one place only.
  """

  def update(updates, state, params=None, *, learning_rate, **_):
    del params
    return jax.tree.map(lambda u: -learning_rate * u, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An Optax chain together with the L2 term that it adds to the gradient.

  Attributes:
    tx: the chain; `tx.update(grads, opt_state, params, learning_rate=...)`.
      The gradients it takes are those of the cross-entropy alone.
    l2: the objective's coefficient of sum(w**2).
    l2_weights: key of `L2_WEIGHTS`.
    links: what the chain's links are, for people.
  """

  tx: optax.GradientTransformationExtraArgs
  l2: float
  l2_weights: str
  links: tuple[str, ...]

  def update(
    self,
    grads: PyTree,
    opt_state: PyTree,
    params: PyTree,
    learning_rate: jax.Array,
  ) -> tuple[PyTree, PyTree]:
    """One step of the chain, some modules of the network at a time.

    On CPUs each of these groups is a computation of its own, so that compiling
    a deep network's step needs less memory. No link of the chain looks at more
    than one array.

    Args:
      grads: of the cross-entropy; a dict of modules, like `params`.
      opt_state: what `tx.init(params)` or an earlier update returned.
      params: the parameters.
      learning_rate: float32[].

    Returns:
      New parameters and the new state.
    """
    modules = params.keys()

    def is_like_params(node):
      return isinstance(node, dict) and node.keys() == modules

    def select(tree, names):
      return jax.tree.map(
        lambda node: (
          {name: node[name] for name in names} if is_like_params(node) else node
        ),
        tree,
        is_leaf=is_like_params,
      )

    def update(grads, opt_state, params, learning_rate):
      updates, opt_state = self.tx.update(
        grads, opt_state, params, learning_rate=learning_rate
      )
      return optax.apply_updates(params, updates), opt_state

    results = [
      leaves.apart(
        update,
        *(select(tree, group) for tree in (grads, opt_state, params)),
        learning_rate,
      )
      for group in leaves.in_groups(list(modules), _GROUP_SIZE)
    ]

    def merge(node, *parts):
      if not is_like_params(node):
        return parts[0]  # A count, which all have.
      return functools.reduce(operator.or_, parts)

    # Parts end where the whole has something like the parameters.
    return jax.tree.map(
      merge, (params, opt_state), *results, is_leaf=is_like_params
    )

  def penalty(self, params: PyTree) -> jax.Array:
    """The L2 term of the objective, float32[]: l2 * sum(w**2)."""
    mask = L2_WEIGHTS[self.l2_weights](params)
    masked = [
      weight
      for weight, is_masked in zip(
        jax.tree.leaves(params), jax.tree.leaves(mask), strict=True
      )
      if is_masked
    ]
    squares = leaves.reduce_each(lambda w: jnp.sum(jnp.square(w)), masked)
    return jnp.asarray(self.l2 * jnp.sum(squares), jnp.float32)


def create_optimizer(config: ConfigDict) -> Optimizer:
  """Builds the chain that `config.optimizer` describes.

  The L2 term enters before the moments (coupled, as Keras's kernel
  regularizer and Caffe's weight decay do), not after them as in AdamW.

  Args:
    config: the `optimizer` part of the configuration.

  Raises:
    ConfigError: an unknown name.
  """
  if config.l2_weights not in L2_WEIGHTS:
    raise errors.unknown_name(
      "optimizer.l2_weights", config.l2_weights, L2_WEIGHTS
    )
  links: dict[str, optax.GradientTransformation] = {
    f"add_decayed_weights({2 * config.l2:g}, mask={config.l2_weights})": (
      optax.add_decayed_weights(
        2 * config.l2, mask=L2_WEIGHTS[config.l2_weights]
      )
    )
  }
  if config.name == "adam":
    b1, b2, eps = config.b1, config.b2, config.epsilon
    links[f"scale_by_adam(b1={b1:g}, b2={b2:g}, eps={eps:g})"] = (
      optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    )
  elif config.name == "sgd":
    links[f"trace(decay={config.momentum:g})"] = optax.trace(config.momentum)
  else:
    raise errors.unknown_name("optimizer.name", config.name, NAMES)
  links["scale_by_learning_rate(schedule)"] = _scale_by_learning_rate()
  return Optimizer(
    tx=optax.with_extra_args_support(optax.chain(*links.values())),
    l2=config.l2,
    l2_weights=config.l2_weights,
    links=tuple(links),
  )
