"""Rules that change the learning rate by how training goes; off by default.

Each has a state, which is part of the train state and of every checkpoint.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

PyTree = Any
RateState = dict[str, PyTree]  # Of the rules, by their names.


@dataclasses.dataclass(frozen=True)
class Plateau:
  """Keras's ReduceLROnPlateau: a factor when the loss with L2 stalls."""

  config: ConfigDict  # The part `plateau` of the configuration.

  def _transformation(self) -> optax.GradientTransformationExtraArgs:
    # Keras's rule: an absolute improvement counts, a relative one does not.
    return optax.contrib.reduce_on_plateau(
      factor=self.config.factor,
      patience=self.config.patience,
      cooldown=self.config.cooldown,
      rtol=0.0,
      atol=self.config.min_delta,
    )

  def init(self) -> PyTree:
    """Optax's state, which takes one update an epoch."""
    return self._transformation().init(jnp.zeros((), jnp.float32))

  def __call__(self, rate: jax.Array, state: PyTree) -> jax.Array:
    """The rate, float32[], that becomes of a schedule's."""
    # The floor limits what the plateau does, not what the schedule does.
    floor = jnp.minimum(rate, self.config.min_lr)
    return jnp.maximum(rate * state.scale, floor)

  def after_step(self, state: PyTree, error: jax.Array) -> PyTree:
    """Takes in nothing."""
    del error
    return state

  def after_epoch(self, state: PyTree, objective: float) -> PyTree:
    """Takes in the monitored loss, L2 included."""
    return self._transformation().update((), state, value=objective)[1]

  def describe(self) -> str:
    """One line for people."""
    return (
      f"plateau: x {self.config.factor:.4g} after {self.config.patience} epochs"
      f" without improvement, not below {self.config.min_lr:g}"
    )


# Share of the old estimate kept at each step: the warm-up looks at the training
# error of about the last 50 batches.
_ERROR_DECAY = 0.98


@dataclasses.dataclass(frozen=True)
class WarmupByError:
  """A low rate until the training error has fallen under a threshold.

  He et al. 2015, section 4.2.
  """

  rate: float
  error: float

  def init(self) -> jax.Array:
    """float32[], a running estimate of the error; 0 for good once it is low."""
    return jnp.ones((), jnp.float32)

  def __call__(self, rate: jax.Array, state: jax.Array) -> jax.Array:
    """The rate, float32[], that becomes of a schedule's."""
    return jnp.where(state > 0, self.rate, rate)

  def after_step(self, state: jax.Array, error: jax.Array) -> jax.Array:
    """Takes in the training error, float32[] in [0, 1], of one batch."""
    new = _ERROR_DECAY * state + (1 - _ERROR_DECAY) * error
    return jnp.where((state > 0) & (new >= self.error), new, 0.0)

  def after_epoch(self, state: jax.Array, objective: float) -> jax.Array:
    """Takes in nothing."""
    del objective
    return state

  def describe(self) -> str:
    """One line for people."""
    return f"warm-up: {self.rate:g} until the training error < {self.error:g}"


class Rules(dict[str, Plateau | WarmupByError]):
  """The rules of a run by their names, in their order."""

  def init(self) -> RateState:
    """The states before the first step."""
    return {name: rule.init() for name, rule in self.items()}

  def __call__(self, rate: jax.Array, state: RateState) -> jax.Array:
    """The rate, float32[], that becomes of a schedule's."""
    for name, rule in self.items():
      rate = rule(rate, state[name])
    return rate

  def after_step(self, state: RateState, error: jax.Array) -> RateState:
    """Takes in the training error, float32[] in [0, 1], of one batch."""
    return {k: rule.after_step(state[k], error) for k, rule in self.items()}

  def after_epoch(self, state: RateState, loss: float) -> RateState:
    """Takes in the monitored loss, L2 included, at the end of an epoch."""
    return {k: rule.after_epoch(state[k], loss) for k, rule in self.items()}

  def describe(self) -> list[str]:
    """One line for each, for people."""
    return [rule.describe() for rule in self.values()]


def create(config: ConfigDict) -> Rules:
  """The rules of the whole configuration."""
  rules = Rules()
  schedule = config.schedule
  if config.plateau.enabled:
    rules["plateau"] = Plateau(config.plateau)
  is_deep = config.model.depth >= schedule.warmup_min_depth
  if schedule.warmup_learning_rate > 0 and is_deep:
    rules["warmup_error"] = WarmupByError(
      schedule.warmup_learning_rate, schedule.warmup_error
    )
  return rules
