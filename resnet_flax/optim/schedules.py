"""Learning-rate schedules: each is a function and an entry of `SCHEDULES`."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


class Schedule(NamedTuple):
  """A learning-rate schedule, before any of the `rate_rules`."""

  rate: optax.Schedule  # Maps the 0-based step, int32[], to the rate.
  lines: list[str]  # Tell the user the rate's changes, in 0-based epochs.


def warmup_steps(config: ConfigDict, steps_per_epoch: int) -> int:
  """Steps of the linear warm-up; they replace the schedule's first steps."""
  return round(config.schedule.linear_warmup_epochs * steps_per_epoch)


def _cosine(config: ConfigDict, steps_per_epoch: int) -> Schedule:
  """Half a cosine from the initial rate to 0 (Loshchilov and Hutter 2016)."""
  base, epochs = config.optimizer.learning_rate, config.num_epochs
  warmup = warmup_steps(config, steps_per_epoch)
  # The warm-up is rounded to whole steps, so it may take all of them.
  cosine = optax.cosine_decay_schedule(
    base, max(epochs * steps_per_epoch - warmup, 1)
  )
  line = f"epoch 0: {base:g}, by half a cosine to 0 at epoch {epochs}"
  return Schedule(lambda step: cosine(step - warmup), [line])


def _constant(config: ConfigDict, _: int) -> Schedule:
  base = config.optimizer.learning_rate
  return Schedule(optax.constant_schedule(base), [f"epoch 0: {base:g}"])


def _onecycle(config: ConfigDict, steps_per_epoch: int) -> Schedule:
  """A triangle (Smith and Topin 2017, without momentum and the last phase)."""
  base, epochs = config.optimizer.learning_rate, config.num_epochs
  total = epochs * steps_per_epoch
  peak = config.schedule.peak_percent * total // 100
  rise = optax.linear_schedule(0.0, base, max(peak, 1))
  fall = optax.linear_schedule(base, 0.0, total - peak)
  rate = optax.join_schedules([rise, fall], [peak])
  line = f"epoch 0: 0, linearly to {base:g} at epoch {peak / steps_per_epoch:g}"
  return Schedule(rate, [f"{line}, linearly to 0 at epoch {epochs}"])


def decay_start(num_epochs: int, percent: int) -> int:
  """The 0-based epoch in which warmup_stable_decay begins to fall."""
  return num_epochs - max(percent * num_epochs // 100, 1)


def _stable_decay(config: ConfigDict, steps_per_epoch: int) -> Schedule:
  """Constant, then linear to 0; exponential in Hu et al. 2024 (MiniCPM)."""
  base, epochs = config.optimizer.learning_rate, config.num_epochs
  start = decay_start(epochs, config.schedule.decay_percent)
  first, steps = start * steps_per_epoch, (epochs - start) * steps_per_epoch
  lines = [f"epoch {start}: {base:g}, linearly to 0 at epoch {epochs}"]
  if start:
    lines.insert(0, f"epoch 0: {base:g}")
  return Schedule(optax.linear_schedule(base, 0.0, steps, first), lines)


def warm_up(config: ConfigDict, after: Schedule, steps: int) -> Schedule:
  """A schedule with a linear rise in its first steps.

  It starts at 0, as in Flax's ImageNet example; Goyal et al. 2017, section 2.2,
  start at the rate of a small batch.
  """
  linear = optax.linear_schedule(0.0, config.optimizer.learning_rate, steps)
  epochs = config.schedule.linear_warmup_epochs
  first, *rest = after.lines
  first = first.replace("epoch 0:", f"epoch {epochs:g}:", 1)
  return Schedule(
    lambda step: jnp.where(step < steps, linear(step), after.rate(step)),
    [f"warm-up: from 0 in {epochs:g} epochs", first, *rest],
  )


# By `schedule.name`: functions of the whole configuration and an epoch's steps.
SCHEDULES: dict[str, Callable[[ConfigDict, int], Schedule]] = {
  "cosine": _cosine,
  "constant": _constant,
  "onecycle": _onecycle,
  "warmup_stable_decay": _stable_decay,
}


def open_epochs(flat_config: Mapping[str, Any]) -> float:
  """The number of initial epochs whose rates do not depend on num_epochs.

  A run that has finished fewer epochs can be lengthened. If anything else of a
  step depends on num_epochs, the answer must be 0.
  """
  if flat_config["schedule.name"] == "warmup_stable_decay":
    percent = flat_config["schedule.decay_percent"]
    return decay_start(flat_config["num_epochs"], percent)
  return math.inf if flat_config["schedule.name"] == "constant" else 0
