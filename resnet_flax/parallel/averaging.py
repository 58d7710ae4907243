"""Averages of the weights over training, kept beside the latest weights.

'ema': an exponential moving average, updated at every step. 'swa': stochastic
weight averaging (Izmailov et al. 2018, arXiv:1803.05407), the equal mean of the
weights at the ends of epochs. The train state has at most one average, which
training never reads. `batch_statistics` may recompute its running statistics.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from resnet_flax import step as step_lib
from resnet_flax.models.kernels import grouping

WEIGHTS = ("raw", "ema", "swa")  # 'raw': the latest weights.


def create(
  config: ConfigDict, steps_per_epoch: int
) -> Callable[[step_lib.TrainState], Any]:
  """Makes `Experiment.average`; the average starts as the state's variables."""
  decay, start = config.ema.decay, config.swa.start_epoch

  def share(step: jax.Array) -> jax.Array:
    """The new variables' share of the average after `step` steps, float32[]."""
    if decay:
      # With n = step - 1, the average keeps min(decay, (1 + n) / (10 + n)).
      return 1 - jnp.minimum(jnp.float32(decay), step / (step + 9))
    count = step // steps_per_epoch - start  # Epochs in the average.
    ends = (step % steps_per_epoch == 0) & (count > 0)
    return jnp.where(ends, 1 / jnp.maximum(count, 1), 0)

  def update(new, nothing, old, weight):
    return optax.incremental_update(new, old, weight), nothing

  def average(state: step_lib.TrainState) -> Any:
    if not (decay or start):
      return None
    if state.average is None:
      # A copy, since a step donates the memory of both.
      return jax.tree.map(jnp.copy, state.variables)
    new, weight = state.variables, share(state.step)
    return {
      name: old and grouping.by_modules(update, new[name], (), old, weight)[0]
      for name, old in state.average.items()
    }

  return average


def available(config: ConfigDict, num_epochs: int) -> tuple[str, ...]:
  """The kinds of `WEIGHTS` that a run has after `num_epochs` whole epochs."""
  if config.ema.decay:
    return WEIGHTS[:2]
  has_begun = 0 < config.swa.start_epoch < num_epochs
  return ("raw", "swa") if has_begun else ("raw",)


def scored_as(split: str, weights: str) -> str:
  """The name of a split's scores in records: 'test', 'test_ema'."""
  return f"{split}_{weights}".removesuffix("_raw")


def select(state: step_lib.TrainState, weights: str) -> step_lib.TrainState:
  """The state with these `WEIGHTS` as its variables."""
  return state if weights == "raw" else state.replace(**state.average)
