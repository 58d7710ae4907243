"""resnet_flax's network and training step, with its huge pages."""

import functools
import itertools

import jax
import numpy as np

from configs import v1_depth20
from experiments.throughput.workers import measure, plain
from experiments.tools.timing import prepare
from resnet_flax import step as step_lib
from resnet_flax.run import (
  environment,
  experiment as experiment_lib,
  huge_pages,
  rules,
)


def build_experiment(task: measure.Task):
  """Builds the task's configuration and its experiment."""
  config = v1_depth20.get_config()
  config.model.depth = task.depth
  config.batch_size = task.batch_size
  # All programs compute on the same pixels / 255, without augmentation.
  config.augment.name = "none"
  config.normalization = "none"
  rules.check(config, num_devices=jax.device_count())
  return config, experiment_lib.build(config)


class Program:
  """Trains and predicts on one batch that stays on the device."""

  def __init__(self, task: measure.Task):
    self._task = task
    pixels, labels = task.batch()
    self._images = np.frombuffer(pixels, np.uint8).reshape(
      -1, *measure.IMAGE_SHAPE
    )
    self._labels = np.frombuffer(labels, np.uint8).astype(np.int32)

  def build(self):
    """Builds as `train.train_and_evaluate` does."""
    config, self._experiment = build_experiment(self._task)
    self._resident = prepare(
      config,
      self._experiment,
      self._images,
      self._labels,
    )
    return self._train

  def _train(self, steps: int) -> float:
    (sums,) = self._resident.train(
      itertools.repeat(self._resident.batch, steps)
    )
    # The sums accumulate over the steps of an epoch.
    return float(sums["loss"]) / int(sums["count"])

  def build_inference(self):
    """Builds as `inference.load_model` does."""
    logits = jax.jit(
      functools.partial(step_lib.apply_eval, self._experiment.model)
    )

    (state,) = self._resident.state.chunks

    def predict(steps: int) -> None:
      for _ in range(steps):
        result = logits(state, self._images)
      jax.block_until_ready(result)

    return predict


def main() -> None:
  """Measures the task of the command line."""
  # The measurement includes compilation.
  jax.config.update("jax_enable_compilation_cache", False)
  measure.run(
    Program,
    matmul=plain.matmul,
    libraries=("jax", "jaxlib", "flax", "optax", "numpy"),
    threads=measure.num_cpus(),
    environment=environment.describe(jax.devices()),
  )


if __name__ == "__main__":
  huge_pages.use()
  main()
