"""Optimizers and learning-rate schedules: one function and one entry each.

The chain is: L2 term, optimizer, learning rate. The rate is a pure function of
the step and of a small `RateState`, which is part of every checkpoint.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from resnet_flax.models.kernels import grouping

PyTree = Any

# ---- Optimizers


def _adam(config: ConfigDict) -> tuple[str, optax.GradientTransformation]:
  b1, b2, eps = config.b1, config.b2, config.epsilon
  title = f"scale_by_adam(b1={b1:g}, b2={b2:g}, eps={eps:g})"
  return title, optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def _sgd(config: ConfigDict) -> tuple[str, optax.GradientTransformation]:
  return f"trace(decay={config.momentum:g})", optax.trace(config.momentum)


# For `optimizer.name`: what it is, for people, and the Optax transformation.
OPTIMIZERS = {"adam": _adam, "sgd": _sgd}

# Transformations that look at each array by itself. A chain of these alone is
# cheaper to compile in groups of arrays; see `grouping.by_modules`.
_ARRAY_BY_ARRAY = {
  "add_decayed_weights",
  "scale_by_adam",
  "trace",
  "scale_by_learning_rate",
}


def _is_kernel(path: tuple[Any, ...], leaf: Any) -> bool:
  del leaf
  return path[-1].key == "kernel"


def _is_conv_kernel(path: tuple[Any, ...], leaf: Any) -> bool:
  return path[-1].key == "kernel" and leaf.ndim == 4


def _is_weight(path: tuple[Any, ...], leaf: Any) -> bool:
  del path, leaf
  return True


# For `optimizer.l2_weights`: which parameters the L2 term is made of.
L2_WEIGHTS = {
  "conv_kernels": _is_conv_kernel,
  "kernels": _is_kernel,
  "all": _is_weight,
}


def _scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
  """Descends at the rate that `update` is given, which is logged as well."""

  def update(updates, state, params=None, *, learning_rate, **_):
    del params
    return jax.tree.map(lambda u: -learning_rate * u, updates), state

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
    "scale_by_learning_rate(schedule)": _scale_by_learning_rate(),
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

  Args:
    num_epochs: length of the run.
    percents: where the drops are, in percent of the run.
    inclusive: drop at the named epoch (He et al. 2015: 82 and 123 of 164) or
      at the first one after it (the Keras example: 81, 121, 161, 181 of 200).
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


# For `schedule.name`. Each is a function of the whole configuration, of an
# epoch's steps and of the steps of the linear warm-up, which comes before it.
SCHEDULES: dict[str, Callable[[ConfigDict, int, int], Schedule]] = {
  "drops": _drops,
  "cosine": _cosine,
}


class RateState(flax.struct.PyTreeNode):
  """What the rate depends on besides the step; () where a rule is off."""

  # State of `optax.contrib.reduce_on_plateau`, one update an epoch.
  plateau: Any
  # float32[], running estimate of the training error; set to 0 for good once it
  # has fallen under the threshold.
  warmup_error: Any


# Share of the old estimate kept at each step: the warm-up rule looks at the
# training error of about the last 50 batches.
_ERROR_DECAY = 0.98


@dataclasses.dataclass(frozen=True)
class LearningRate:
  """The rate of one experiment."""

  schedule: Schedule  # By the step alone, linear warm-up included.
  steps_per_epoch: int
  # (rate, error): that rate until the training error falls under the threshold
  # (He et al. 2015, section 4.2).
  warmup: tuple[float, float] | None
  plateau: ConfigDict | None  # That part of the configuration.

  def init(self) -> RateState:
    """The state before the first step."""
    return RateState(
      plateau=self._plateau().init(jnp.zeros(())) if self.plateau else (),
      warmup_error=jnp.ones(()) if self.warmup else (),
    )

  def __call__(self, step: jax.Array, state: RateState) -> jax.Array:
    """The rate, float32[], of the 0-based `step`, int32[]."""
    rate = jnp.asarray(self.schedule.rate(step), jnp.float32)
    if self.plateau:
      # The floor limits what the plateau does, not what the schedule does.
      floor = jnp.minimum(rate, self.plateau.min_lr)
      rate = jnp.maximum(rate * state.plateau.scale, floor)
    if self.warmup:
      rate = jnp.where(state.warmup_error > 0, self.warmup[0], rate)
    return rate

  def after_step(self, state: RateState, error: jax.Array) -> RateState:
    """Takes in the training error, float32[] in [0, 1], of one batch."""
    if not self.warmup:
      return state
    old = state.warmup_error
    new = _ERROR_DECAY * old + (1 - _ERROR_DECAY) * error
    warming = (old > 0) & (new >= self.warmup[1])
    return state.replace(warmup_error=jnp.where(warming, new, 0.0))

  def after_epoch(self, state: RateState, objective: float) -> RateState:
    """Takes in the monitored loss, L2 included, at the end of an epoch."""
    if not self.plateau:
      return state
    _, plateau = self._plateau().update((), state.plateau, value=objective)
    return state.replace(plateau=plateau)

  def _plateau(self) -> optax.GradientTransformationExtraArgs:
    assert self.plateau is not None
    # Keras's rule: an absolute improvement counts, a relative one does not.
    return optax.contrib.reduce_on_plateau(
      factor=self.plateau.factor,
      patience=self.plateau.patience,
      cooldown=self.plateau.cooldown,
      rtol=0.0,
      atol=self.plateau.min_delta,
    )

  def describe(self) -> list[str]:
    """One line for each change of the rate, for people."""
    lines = list(self.schedule.lines)
    if self.warmup:
      rate, error = self.warmup
      lines.append(f"warm-up: {rate:g} until the training error < {error:g}")
    if self.plateau:
      lines.append(
        f"plateau: x {self.plateau.factor:.4g} after"
        f" {self.plateau.patience} epochs without improvement, not below"
        f" {self.plateau.min_lr:g}"
      )
    return lines


def create_learning_rate(
  config: ConfigDict, steps_per_epoch: int
) -> LearningRate:
  """The learning rate that the whole configuration describes."""
  schedule = config.schedule
  steps = round(schedule.linear_warmup_epochs * steps_per_epoch)
  planned = SCHEDULES[schedule.name](config, steps_per_epoch, steps)
  if steps:
    # From 0, as in Flax's ImageNet example; Goyal et al. 2017, section 2.2,
    # begin at the rate of a small batch.
    linear = optax.linear_schedule(0.0, config.optimizer.learning_rate, steps)
    rate = planned.rate
    planned = Schedule(
      lambda step: jnp.where(step < steps, linear(step), rate(step)),
      [
        f"warm-up: from 0 in {schedule.linear_warmup_epochs:g} epochs",
        *planned.lines,
      ],
    )
  warmup = None
  if (
    schedule.warmup_learning_rate > 0
    and config.model.depth >= schedule.warmup_min_depth
  ):
    warmup = (schedule.warmup_learning_rate, schedule.warmup_error)
  return LearningRate(
    schedule=planned,
    steps_per_epoch=steps_per_epoch,
    warmup=warmup,
    plateau=config.plateau if config.plateau.enabled else None,
  )
