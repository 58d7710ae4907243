"""resnet_flax's network and training step, as the main command has them."""

import functools
import itertools
from typing import Any

import jax
import numpy as np

from configs import v1_depth20
from experiments.throughput.workers import measure, plain
from experiments.tools import timing
from resnet_flax import step as step_lib
from resnet_flax.run import experiment as experiment_lib, rules


def build_experiment(task: measure.Task):
  """Builds the task's configuration and its experiment."""
  config = v1_depth20.get_config()
  config.model.depth = task.depth
  config.model.dtype = task.dtype
  config.batch_size = task.batch_size
  if task.mode != "data":
    # All programs compute on the same pixels / 255, without augmentation.
    config.augment.name = "none"
    config.normalization = "none"
  rules.check(config, num_devices=jax.device_count())
  return config, experiment_lib.build(config)


class Program:
  """Trains on real data or on one batch that stays on the device."""

  libraries = plain.Program.libraries

  def __init__(self, task: measure.Task):
    self._task = task

  def build(self):
    """Builds as `train.train_and_evaluate` does."""
    config, self._experiment = build_experiment(self._task)
    if self._task.mode == "data":
      self._trainer, batches_from = timing.prepare_on_data(config)
      batches = batches_from(0)
      return {
        "train": lambda steps: self._train(itertools.islice(batches, steps)),
        "resident": self._train_on_resident_batch,
      }
    self._trainer = timing.prepare(
      config, self._experiment, *self._task.batch()
    )
    self._logits = jax.jit(
      functools.partial(step_lib.apply_eval, self._experiment.model)
    )
    return {
      "train": self._train_on_resident_batch,
      "infer": self._infer,
      "matmul": plain.matmul,
    }

  def _train(self, batches) -> float:
    (sums,) = self._trainer.train(batches)
    # The sums accumulate over the steps of an epoch.
    return float(sums["loss"]) / int(sums["count"])

  def _train_on_resident_batch(self, steps: int) -> float:
    return self._train(itertools.repeat(self._trainer.batch, steps))

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
    """Says what JAX has."""
    (state,) = self._trainer.state.chunks
    return plain.facts(state.params, *map(np.asarray, self._resident()))


if __name__ == "__main__":
  measure.serve(Program)
