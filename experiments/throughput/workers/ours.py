"""resnet_flax's network and training step, as the main command has them."""

import functools
from typing import Any

import jax
import numpy as np

from configs import v1_depth20
from experiments.throughput.workers import measure, plain
from experiments.tools import timing
from resnet_flax import step as step_lib
from resnet_flax.run import experiment as experiment_lib


def build_config(task: measure.Task):
  """The task as a configuration."""
  config = v1_depth20.get_config()
  config.model.depth = task.depth
  config.model.dtype = task.dtype
  config.batch_size = task.batch_size
  if task.mode != "data":
    # All programs compute on the same pixels / 255, without augmentation.
    config.augment.name = "none"
    config.normalization = "none"
  return config


def _loss(sums) -> float:
  """The mean loss of the only seed over the epoch's steps so far."""
  return float(sums[0]["loss"]) / int(sums[0]["count"])


class Program:
  """Trains on real data or on one batch that stays on the device."""

  libraries = plain.Program.libraries

  def __init__(self, task: measure.Task):
    self._config = build_config(task)
    self._with_data = task.mode == "data"
    # The other workers, too, make batch and devices before the clock starts.
    self._split = None if self._with_data else timing.noise(self._config)
    jax.devices()

  def build(self):
    """Initialises and compiles as `train.train_and_evaluate` does."""
    self._trainer = timing.prepare(self._config, self._split)

    def train(steps: int) -> float:
      return _loss(self._trainer.train(steps))

    def repeat(steps: int) -> float:
      return _loss(self._trainer.repeat(steps))

    if self._with_data:
      return {"train": train, "resident": repeat}
    model = experiment_lib.build(self._config).model
    self._logits = jax.jit(functools.partial(step_lib.apply_eval, model))
    return {"train": repeat, "infer": self._infer, "matmul": plain.matmul}

  def _resident(self) -> tuple[jax.Array, ...]:
    batch = self._trainer.batch.images_and_labels()
    return tuple(each.chunks[0] for each in batch)

  def _infer(self, steps: int) -> None:
    (state,) = self._trainer.state.chunks
    images, _ = self._resident()
    for _ in range(steps):
      result = self._logits(state, images)
    jax.block_until_ready(result)

  def facts(self) -> dict[str, Any]:
    """Facts from JAX; see `plain.facts`."""
    (state,) = self._trainer.state.chunks
    return plain.facts(state.params, *map(np.asarray, self._resident()))


if __name__ == "__main__":
  measure.serve(Program)
