"""The optimizer: a chain of Optax's transformations, and its L2 term.

Adam and SGD are here; `any_optax` has Optax's other optimizers by name.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from resnet_flax.models.kernels import grouping
from resnet_flax.optim import any_optax

PyTree = Any


def _adam(config: ConfigDict) -> any_optax.Rule:
  b1, b2 = config.b1, config.b2
  return any_optax.rule("adam", optax.adam, b1=b1, b2=b2, eps=config.epsilon)


def _sgd(config: ConfigDict) -> any_optax.Rule:
  momentum, nesterov = config.momentum, config.nesterov
  return any_optax.rule("sgd", optax.sgd, momentum=momentum, nesterov=nesterov)


# For `optimizer.name`, whose choices are in run/config.py; others: `any_optax`.
OPTIMIZERS = {"adam": _adam, "sgd": _sgd}

# Names of links that treat each array by itself. A chain of only these links is
# compiled in groups of arrays, which is faster; see `grouping`.
_ARRAY_BY_ARRAY = {
  *("add_decayed_weights", "adam", "sgd", "adamw", "lamb", "lion"),
  "MultiSteps",
}

# For `optimizer.l2_weights`: which parameters decay, by their paths and arrays.
L2_WEIGHTS: dict[str, Callable[[Any, jax.Array], bool]] = {
  "conv_kernels": lambda path, w: path[-1].key == "kernel" and w.ndim == 4,
  "kernels": lambda path, w: path[-1].key == "kernel",
  "all": lambda path, w: True,
}


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An Optax chain together with the L2 term that it adds to the gradient."""

  # Its `update` takes gradients without the L2 term, and `learning_rate=`.
  tx: optax.GradientTransformationExtraArgs
  l2: float  # The objective's coefficient of sum(w**2).
  is_decayed: Callable[[Any, jax.Array], bool]  # An entry of `L2_WEIGHTS`.
  links: tuple[str, ...]  # Titles of the chain's links: NAME(VALUES).

  def update(
    self,
    grads: PyTree,
    opt_state: PyTree,
    params: PyTree,
    learning_rate: jax.Array,
  ) -> tuple[PyTree, PyTree]:
    """One step of the chain: new parameters and the chain's new state."""

    def update(grads, opt_state, params, learning_rate):
      updates, opt_state = self.tx.update(
        grads, opt_state, params, learning_rate=learning_rate
      )
      return optax.apply_updates(params, updates), opt_state

    names = {link.partition("(")[0] for link in self.links}
    arguments = (grads, opt_state, params, learning_rate)
    if names <= _ARRAY_BY_ARRAY:
      return grouping.by_modules(update, *arguments)
    return grouping.apart(update, *arguments)

  def penalty(self, params: PyTree) -> jax.Array:
    """The L2 term of the objective, float32[]: l2 * sum(w**2)."""
    decayed = [
      weight
      for path, weight in jax.tree_util.tree_leaves_with_path(params)
      if self.is_decayed(path, weight)
    ]
    squares = grouping.reduce_each(lambda w: jnp.sum(jnp.square(w)), decayed)
    return jnp.asarray(self.l2 * jnp.sum(squares), jnp.float32)


def create_optimizer(config: ConfigDict) -> Optimizer:
  """Builds the chain that `config.optimizer` describes.

  The L2 term enters before the moments, as in Keras. So does weight decay, as
  in Caffe, unless the optimizer has its own, as AdamW has. Raises `ValueError`
  if an optimizer of Optax refuses `config.arguments`, or needs more than
  gradients and parameters.
  """
  is_decayed = L2_WEIGHTS[config.l2_weights]

  def mask(params):
    return jax.tree_util.tree_map_with_path(is_decayed, params)

  def decay(factor):
    title = f"add_decayed_weights({factor:g}, mask={config.l2_weights})"
    return {title: optax.add_decayed_weights(factor, mask=mask)}

  create = OPTIMIZERS.get(config.name)
  rule = create(config) if create else any_optax.create(config, mask)
  # In this order. More transformations can be put between or around them.
  links: dict[str, optax.GradientTransformation] = decay(2 * config.l2)
  if norm := config.clip_norm:
    links[f"clip_by_global_norm({norm:g})"] = optax.clip_by_global_norm(norm)
  if config.weight_decay and not rule.decays_weights:
    links |= decay(config.weight_decay)
  links[rule.title] = any_optax.follow_rate(rule, config.learning_rate)
  tx = optax.chain(*links.values())
  titles = tuple(links)
  if (steps := config.accumulate_steps) > 1:
    around = optax.MultiSteps(tx, steps)
    tx = optax.GradientTransformationExtraArgs(around.init, around.update)
    titles = (f"MultiSteps({steps}), around:", *titles)
  return Optimizer(tx, config.l2, is_decayed, titles)
