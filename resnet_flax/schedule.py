"""The learning rate: drops or a cosine, warm-ups, reduction on plateau.

The rate is a pure function of the step and a small `RateState`, which is part
of the train state and so of every checkpoint.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from resnet_flax.run import errors

# What the rate does after a warm-up.
NAMES = ("drops", "cosine")

# Share of the old estimate kept at each step: the warm-up rule looks at the
# training error of about the last 50 batches.
_ERROR_DECAY = 0.98


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


class RateState(flax.struct.PyTreeNode):
  """What the rate depends on besides the step; () where a rule is off.

  Attributes:
    plateau: state of `optax.contrib.reduce_on_plateau`, one update an epoch.
    warmup_error: float32[], running estimate of the training error; set to 0
      for good once it has fallen under the threshold.
  """

  plateau: Any
  warmup_error: Any


@dataclasses.dataclass(frozen=True)
class LearningRate:
  """The rate of one experiment.

  Attributes:
    drops: (0-based epoch, rate) pairs; the first is (0, initial rate).
    steps_per_epoch: steps of an epoch.
    warmup: (rate, error) of the paper's warm-up, or None.
    plateau: the `plateau` part of the configuration, or None.
    linear_warmup_epochs: epochs in which the rate rises from 0 to the initial
      one, before the first drop. As in Flax's ImageNet example; Goyal et al.
      2017, section 2.2, begin at the rate of a small batch.
    cosine_epochs: the epoch, after those, in which half a cosine has led from
      the initial rate to 0 (Loshchilov and Hutter 2016); None: it does not.
  """

  drops: tuple[tuple[int, float], ...]
  steps_per_epoch: int
  warmup: tuple[float, float] | None
  plateau: ConfigDict | None
  linear_warmup_epochs: float = 0.0
  cosine_epochs: int | None = None

  def init(self) -> RateState:
    """The state before the first step."""
    return RateState(
      plateau=(
        _plateau(self.plateau).init(jnp.zeros(())) if self.plateau else ()
      ),
      warmup_error=jnp.ones(()) if self.warmup else (),
    )

  def __call__(self, step: jax.Array, state: RateState) -> jax.Array:
    """The rate, float32[], of the 0-based `step`, int32[]."""
    (_, initial), *drops = self.drops
    warmup = round(self.linear_warmup_epochs * self.steps_per_epoch)
    pieces = [optax.constant_schedule(rate) for _, rate in self.drops]
    boundaries = [epoch * self.steps_per_epoch for epoch, _ in drops]
    if self.cosine_epochs:
      length = self.cosine_epochs * self.steps_per_epoch - warmup
      # A warm-up of all but a part of the last step is rounded to all of them.
      pieces[0] = optax.cosine_decay_schedule(initial, max(length, 1))
    if warmup:
      pieces.insert(0, optax.linear_schedule(0.0, initial, warmup))
      boundaries.insert(0, warmup)
    rate = optax.join_schedules(pieces, boundaries)(step)
    rate = jnp.asarray(rate, jnp.float32)
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
    _, plateau = _plateau(self.plateau).update(
      (), state.plateau, value=objective
    )
    return state.replace(plateau=plateau)

  def describe(self) -> list[str]:
    """One line for each change of the rate, for people."""
    lines = [f"epoch {epoch}: {rate:g}" for epoch, rate in self.drops]
    if self.cosine_epochs:
      lines[0] += f", by half a cosine to 0 at epoch {self.cosine_epochs}"
    if self.linear_warmup_epochs:
      lines.insert(
        0, f"warm-up: from 0 in {self.linear_warmup_epochs:g} epochs"
      )
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


def _plateau(config: ConfigDict) -> optax.GradientTransformationExtraArgs:
  # Keras's rule: an absolute improvement counts, a relative one does not.
  return optax.contrib.reduce_on_plateau(
    factor=config.factor,
    patience=config.patience,
    cooldown=config.cooldown,
    rtol=0.0,
    atol=config.min_delta,
  )


def create_learning_rate(
  config: ConfigDict, steps_per_epoch: int
) -> LearningRate:
  """The learning rate of an experiment.

  Args:
    config: the whole configuration.
    steps_per_epoch: steps of an epoch.

  Raises:
    ConfigError: an unknown name.
  """
  base, schedule = config.optimizer.learning_rate, config.schedule
  drops = {0: base}
  if schedule.name == "drops":
    epochs = drop_epochs(
      config.num_epochs, schedule.drop_percents, schedule.drop_inclusive
    )
    # A short run may have two drops at one epoch: the later one counts. Drops
    # that the run does not reach are left out.
    for epoch, factor in zip(epochs, schedule.drop_factors, strict=True):
      if epoch < config.num_epochs:
        drops[epoch] = base * factor
  elif schedule.name != "cosine":
    raise errors.unknown_name("schedule.name", schedule.name, NAMES)
  warmup = None
  if (
    schedule.warmup_learning_rate > 0
    and config.model.depth >= schedule.warmup_min_depth
  ):
    warmup = (schedule.warmup_learning_rate, schedule.warmup_error)
  return LearningRate(
    drops=tuple(sorted(drops.items())),
    steps_per_epoch=steps_per_epoch,
    warmup=warmup,
    plateau=config.plateau if config.plateau.enabled else None,
    linear_warmup_epochs=schedule.linear_warmup_epochs,
    cosine_epochs=config.num_epochs if schedule.name == "cosine" else None,
  )
