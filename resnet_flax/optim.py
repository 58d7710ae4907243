"""Optimizers and learning-rate schedules: one function and one entry each.

The chain is: L2 term, optimizer, learning rate.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from resnet_flax import rate_rules
from resnet_flax.models.kernels import grouping

PyTree = Any
RateState = dict[str, PyTree]  # Of the rules in `rate_rules`, by name.

# ---- Optimizers


def _adam(config: ConfigDict) -> tuple[str, optax.GradientTransformation]:
  b1, b2, eps = config.b1, config.b2, config.epsilon
  title = f"adam(b1={b1:g}, b2={b2:g}, eps={eps:g})"
  return title, optax.adam(1.0, b1=b1, b2=b2, eps=eps)


def _sgd(config: ConfigDict) -> tuple[str, optax.GradientTransformation]:
  momentum = config.momentum
  return f"sgd(momentum={momentum:g})", optax.sgd(1.0, momentum=momentum)


# For `optimizer.name`, whose choices are in run/config.py: a title for people,
# and any Optax optimizer at learning rate 1, which the chain scales.
OPTIMIZERS = {"adam": _adam, "sgd": _sgd}

# Links, by their titles, that look at each array by itself. A chain of these
# alone is compiled in groups of arrays, which is cheaper; see `grouping`.
_ARRAY_BY_ARRAY = {"add_decayed_weights", "adam", "sgd", "scale_by_schedule"}


# For `optimizer.l2_weights`: which parameters the L2 term is made of, by their
# paths and arrays.
L2_WEIGHTS: dict[str, Callable[[Any, jax.Array], bool]] = {
  "conv_kernels": lambda path, w: path[-1].key == "kernel" and w.ndim == 4,
  "kernels": lambda path, w: path[-1].key == "kernel",
  "all": lambda path, w: True,
}


def _scale_by_schedule() -> optax.GradientTransformationExtraArgs:
  """Scales by the rate that `update` is given, which is logged as well."""

  def update(updates, state, params=None, *, learning_rate, **_):
    del params
    return jax.tree.map(lambda u: learning_rate * u, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """An Optax chain together with the L2 term that it adds to the gradient."""

  # Takes the gradients of the cross-entropy alone, and `learning_rate=`.
  tx: optax.GradientTransformationExtraArgs
  l2: float  # The objective's coefficient of sum(w**2).
  l2_weights: str  # A key of `L2_WEIGHTS`.
  links: tuple[str, ...]  # The chain's links, for people.

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
    is_masked = L2_WEIGHTS[self.l2_weights]
    masked = [
      weight
      for path, weight in jax.tree_util.tree_leaves_with_path(params)
      if is_masked(path, weight)
    ]
    squares = grouping.reduce_each(lambda w: jnp.sum(jnp.square(w)), masked)
    return jnp.asarray(self.l2 * jnp.sum(squares), jnp.float32)


def create_optimizer(config: ConfigDict) -> Optimizer:
  """Builds the chain that `config.optimizer` describes.

  The L2 term enters before the moments (coupled, as Keras's kernel
  regularizer and Caffe's weight decay do), not after them as in AdamW.
  """
  is_masked = L2_WEIGHTS[config.l2_weights]
  title, rule = OPTIMIZERS[config.name](config)
  # In this order. More transformations can be put between or around them.
  links: dict[str, optax.GradientTransformation] = {
    f"add_decayed_weights({2 * config.l2:g}, mask={config.l2_weights})": (
      optax.add_decayed_weights(
        2 * config.l2,
        mask=lambda params: jax.tree_util.tree_map_with_path(is_masked, params),
      )
    ),
    title: rule,
    "scale_by_schedule": _scale_by_schedule(),
  }
  return Optimizer(
    tx=optax.with_extra_args_support(optax.chain(*links.values())),
    l2=config.l2,
    l2_weights=config.l2_weights,
    links=tuple(links),
  )


# ---- Schedules


def drop_epochs(
  num_epochs: int, percents: Sequence[int], inclusive: bool
) -> tuple[int, ...]:
  """The 0-based epochs at which the rate drops, in integer arithmetic.

  With `inclusive` at the epoch that a percentage of the run names (He et al.
  2015: 82 and 123 of 164), else at the first one after it (the Keras example:
  81, 121, 161 and 181 of 200).
  """
  if inclusive:
    return tuple(-(-percent * num_epochs // 100) for percent in percents)
  return tuple(percent * num_epochs // 100 + 1 for percent in percents)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The rate before plateau and warm-up by training error."""

  rate: optax.Schedule  # Of the int32[] step, 0-based.
  lines: list[str]  # What it does, for people.


def _drops(config: ConfigDict, steps_per_epoch: int, warmup: int) -> Schedule:
  del warmup  # It is over before the first drop; `rules` sees to it.
  base, schedule = config.optimizer.learning_rate, config.schedule
  epochs = drop_epochs(
    config.num_epochs, schedule.drop_percents, schedule.drop_inclusive
  )
  # A short run may have two drops at one epoch: the later one counts. Drops
  # that the run does not reach are left out.
  rates = {0: base} | {
    epoch: base * factor
    for epoch, factor in zip(epochs, schedule.drop_factors, strict=True)
    if epoch < config.num_epochs
  }
  rates = dict(sorted(rates.items()))
  rate = optax.join_schedules(
    [optax.constant_schedule(rate) for rate in rates.values()],
    [epoch * steps_per_epoch for epoch in list(rates)[1:]],
  )
  lines = [f"epoch {epoch}: {rate:g}" for epoch, rate in rates.items()]
  return Schedule(rate, lines)


def _cosine(config: ConfigDict, steps_per_epoch: int, warmup: int) -> Schedule:
  """Half a cosine from the initial rate to 0 (Loshchilov and Hutter 2016)."""
  base, epochs = config.optimizer.learning_rate, config.num_epochs
  # A warm-up of all but a part of the last step is rounded to all of them.
  cosine = optax.cosine_decay_schedule(
    base, max(epochs * steps_per_epoch - warmup, 1)
  )
  line = f"epoch 0: {base:g}, by half a cosine to 0 at epoch {epochs}"
  return Schedule(lambda step: cosine(step - warmup), [line])


def _constant(config: ConfigDict, *_: int) -> Schedule:
  base = config.optimizer.learning_rate
  return Schedule(optax.constant_schedule(base), [f"epoch 0: {base:g}"])


# For `schedule.name`. Each is a function of the whole configuration, of an
# epoch's steps and of the steps of the linear warm-up, which comes before it.
SCHEDULES: dict[str, Callable[[ConfigDict, int, int], Schedule]] = {
  "drops": _drops,
  "cosine": _cosine,
  "constant": _constant,
}
# A run by one of these, which do not depend on num_epochs, can be lengthened.
OPEN_ENDED = ("constant",)


@dataclasses.dataclass(frozen=True)
class LearningRate:
  """The rate of one experiment: a schedule, then the rules of `rate_rules`.

  A pure function of the step and of the rules' states, which the train state
  has by their names.
  """

  schedule: Schedule
  steps_per_epoch: int
  rules: Mapping[str, rate_rules.Plateau | rate_rules.WarmupByError]

  def init(self) -> RateState:
    """The states before the first step."""
    return {name: rule.init() for name, rule in self.rules.items()}

  def __call__(self, step: jax.Array, state: RateState) -> jax.Array:
    """The rate, float32[], of the 0-based `step`, int32[]."""
    rate = jnp.asarray(self.schedule.rate(step), jnp.float32)
    for name, rule in self.rules.items():
      rate = rule(rate, state[name])
    return rate

  def after_step(self, state: RateState, error: jax.Array) -> RateState:
    """Takes in the training error, float32[] in [0, 1], of one batch."""
    return {
      k: rule.after_step(state[k], error) for k, rule in self.rules.items()
    }

  def after_epoch(self, state: RateState, objective: float) -> RateState:
    """Takes in the monitored loss, L2 included, at the end of an epoch."""
    return {
      k: rule.after_epoch(state[k], objective) for k, rule in self.rules.items()
    }

  def describe(self) -> list[str]:
    """One line for each change of the rate, for people."""
    return [*self.schedule.lines, *(r.describe() for r in self.rules.values())]


def create_learning_rate(
  config: ConfigDict, steps_per_epoch: int
) -> LearningRate:
  """The learning rate that the whole configuration describes."""
  base = config.optimizer.learning_rate
  epochs = config.schedule.linear_warmup_epochs
  warmup = round(epochs * steps_per_epoch)
  schedule = SCHEDULES[config.schedule.name](config, steps_per_epoch, warmup)
  if warmup:
    # From 0, as in Flax's ImageNet example; Goyal et al. 2017, section 2.2,
    # begin at the rate of a small batch.
    linear, after = optax.linear_schedule(0.0, base, warmup), schedule.rate
    schedule = Schedule(
      lambda step: jnp.where(step < warmup, linear(step), after(step)),
      [f"warm-up: from 0 in {epochs:g} epochs", *schedule.lines],
    )
  return LearningRate(schedule, steps_per_epoch, rate_rules.create(config))
