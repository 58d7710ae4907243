"""The learning rate of a run: a schedule, then rules that follow training.

The recipe's schedule, `drops`, is here; the others are in `schedules.py`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from resnet_flax.optim import rate_rules, schedules


def drop_epochs(
  num_epochs: int, percents: Sequence[int], inclusive: bool
) -> tuple[int, ...]:
  """The 0-based epochs at which the rate drops, in integer arithmetic.

  If `inclusive`, a drop is at a percentage of the run, rounded up (He et al.
  2015: 82 and 123 of 164), else at the first epoch after it (the Keras example:
  81, 121, 161 and 181 of 200).
  """
  if inclusive:
    return tuple(-(-percent * num_epochs // 100) for percent in percents)
  return tuple(percent * num_epochs // 100 + 1 for percent in percents)


def _drops(config: ConfigDict, steps_per_epoch: int) -> schedules.Schedule:
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
  return schedules.Schedule(rate, lines)


# For `schedule.name`, whose choices are in run/config.py.
SCHEDULES = {"drops": _drops} | schedules.SCHEDULES


@dataclasses.dataclass(frozen=True)
class LearningRate:
  """The learning rate: a pure function of the step and the rules' states."""

  schedule: schedules.Schedule
  steps_per_epoch: int
  rules: rate_rules.Rules

  def __call__(self, step: jax.Array, state: rate_rules.RateState) -> jax.Array:
    """The rate, float32[], of the 0-based `step`, int32[]."""
    return self.rules(jnp.asarray(self.schedule.rate(step), jnp.float32), state)

  def describe(self) -> list[str]:
    """One line for each change of the rate, for people."""
    return [*self.schedule.lines, *(r.line for r in self.rules.values())]


def create_learning_rate(
  config: ConfigDict, steps_per_epoch: int
) -> LearningRate:
  """The learning rate that the whole configuration describes."""
  schedule = SCHEDULES[config.schedule.name](config, steps_per_epoch)
  if steps := schedules.warmup_steps(config, steps_per_epoch):
    schedule = schedules.warm_up(config, schedule, steps)
  return LearningRate(schedule, steps_per_epoch, rate_rules.create(config))
