"""Learning-rate schedules: a function and an entry each."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


class Schedule(NamedTuple):
  """The rate before plateau and warm-up by training error."""

  rate: optax.Schedule  # Of the int32[] step, 0-based.
  lines: list[str]  # Where it changes, by 0-based epochs, for people.


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


def _onecycle(config: ConfigDict, steps_per_epoch: int, _: int) -> Schedule:
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
  """The 0-based epoch from which on warmup_stable_decay falls."""
  return num_epochs - max(percent * num_epochs // 100, 1)


def _stable_decay(config: ConfigDict, steps_per_epoch: int, _: int) -> Schedule:
  """Constant, at last linearly to 0; Hu et al. 2024 (MiniCPM) exponentially."""
  base, epochs = config.optimizer.learning_rate, config.num_epochs
  start = decay_start(epochs, config.schedule.decay_percent)
  first, steps = start * steps_per_epoch, (epochs - start) * steps_per_epoch
  lines = [f"epoch {start}: {base:g}, linearly to 0 at epoch {epochs}"]
  if start:
    lines.insert(0, f"epoch 0: {base:g}")
  return Schedule(optax.linear_schedule(base, 0.0, steps, first), lines)


def warm_up(config: ConfigDict, after: Schedule, steps: int) -> Schedule:
  """A schedule with a linear rise in its first steps.

  From 0, as in Flax's ImageNet example; Goyal et al. 2017, section 2.2, begin
  at the rate of a small batch.
  """
  linear = optax.linear_schedule(0.0, config.optimizer.learning_rate, steps)
  epochs = config.schedule.linear_warmup_epochs
  first, *rest = after.lines
  first = first.replace("epoch 0:", f"epoch {epochs:g}:", 1)
  return Schedule(
    lambda step: jnp.where(step < steps, linear(step), after.rate(step)),
    [f"warm-up: from 0 in {epochs:g} epochs", first, *rest],
  )


# For `schedule.name`. Each is a function of the whole configuration, of an
# epoch's steps and of the steps of the linear warm-up, which comes before it.
SCHEDULES: dict[str, Callable[[ConfigDict, int, int], Schedule]] = {
  "cosine": _cosine,
  "constant": _constant,
  "onecycle": _onecycle,
  "warmup_stable_decay": _stable_decay,
}


def open_epochs(flat_config: Mapping[str, Any]) -> float:
  """The first epochs whose rates do not depend on num_epochs.

  A run that has not begun the next one can be lengthened.
  """
  if flat_config["schedule.name"] == "warmup_stable_decay":
    percent = flat_config["schedule.decay_percent"]
    return decay_start(flat_config["num_epochs"], percent)
  return math.inf if flat_config["schedule.name"] == "constant" else 0
