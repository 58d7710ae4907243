"""Rules that change the learning rate by how training goes; off by default.

Each rule has a state, which is part of the train state and every checkpoint.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

PyTree = Any
RateState = dict[str, PyTree]  # The rules' states, by rule name.


class Rule(NamedTuple):
  """A rule, as functions of its state."""

  line: str  # Describes the rule to the user.
  init: Callable[[], PyTree]  # The state before the first step.
  # Maps the rate so far, float32[], and the state to the new rate.
  rate: Callable[[jax.Array, PyTree], jax.Array]
  # Map a state to the next, after a batch and after an epoch; see `Rules`.
  after_step: Callable[[PyTree, jax.Array], PyTree] = lambda state, error: state
  after_epoch: Callable[[PyTree, float], PyTree] = lambda state, loss: state


def plateau(config: ConfigDict) -> Rule:
  """Keras's ReduceLROnPlateau: lowers the rate when the loss with L2 stalls."""
  # As in Keras, `min_delta` is absolute, not relative to the best loss.
  reduce = optax.contrib.reduce_on_plateau(
    factor=config.factor,
    patience=config.patience,
    cooldown=config.cooldown,
    rtol=0.0,
    atol=config.min_delta,
  )

  def rate(rate, state):
    # The floor limits what the plateau does, not what the schedule does.
    floor = jnp.minimum(rate, config.min_lr)
    return jnp.maximum(rate * state.scale, floor)

  return Rule(
    f"plateau: x {config.factor:.4g} after {config.patience} epochs without"
    f" improvement, not below {config.min_lr:g}",
    init=lambda: reduce.init(jnp.zeros((), jnp.float32)),
    rate=rate,
    after_epoch=lambda state, loss: reduce.update((), state, value=loss)[1],
  )


# Share of the old estimate that a step keeps: 0.98 averages the training error
# over about the last 50 batches.
_ERROR_DECAY = 0.98


def warmup_by_error(low: float, least_error: float) -> Rule:
  """A low rate until the training error has fallen under a threshold.

  He et al. 2015, section 4.2. The state, float32[], is a running estimate of
  the error; once this is below `least_error`, the state stays 0.
  """

  def after_step(state, error):
    new = _ERROR_DECAY * state + (1 - _ERROR_DECAY) * error
    return jnp.where((state > 0) & (new >= least_error), new, 0.0)

  return Rule(
    f"warm-up: {low:g} until the training error < {least_error:g}",
    init=lambda: jnp.ones((), jnp.float32),
    rate=lambda rate, state: jnp.where(state > 0, low, rate),
    after_step=after_step,
  )


class Rules(dict[str, Rule]):
  """The rules of a run by name, in the order in which they change the rate."""

  def init(self) -> RateState:
    """All rules' states before the first step."""
    return {name: rule.init() for name, rule in self.items()}

  def __call__(self, rate: jax.Array, state: RateState) -> jax.Array:
    """The schedule's rate, float32[], after every rule has changed it."""
    for name, rule in self.items():
      rate = rule.rate(rate, state[name])
    return rate

  def after_step(self, state: RateState, error: jax.Array) -> RateState:
    """The states after a batch with this training error, float32[], 0 to 1."""
    return {k: rule.after_step(state[k], error) for k, rule in self.items()}

  def after_epoch(self, state: RateState, loss: float) -> RateState:
    """The states after an epoch with this monitored loss, L2 included."""
    return {k: rule.after_epoch(state[k], loss) for k, rule in self.items()}


def create(config: ConfigDict) -> Rules:
  """The rules that the whole configuration turns on."""
  rules = Rules()
  schedule = config.schedule
  if config.plateau.enabled:
    rules["plateau"] = plateau(config.plateau)
  is_deep = config.model.depth >= schedule.warmup_min_depth
  if schedule.warmup_learning_rate > 0 and is_deep:
    rules["warmup_error"] = warmup_by_error(
      schedule.warmup_learning_rate, schedule.warmup_error
    )
  return rules
