"""Our training step, compiled as by the main command, and a resident batch."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import (
  config_rules,
  datasets,
  experiment as experiment_lib,
  mesh as mesh_lib,
  train,
  train_step,
)
from resnet_flax.datasets import record


@dataclasses.dataclass
class Resident:
  """What a step needs, on the devices.

  Attributes:
    step: the compiled training step; it takes `state` away.
    state: before the next step.
    batch: uint8[B, H, W, C] and int32[B], sharded over the mesh.
    key: key[], the augmentation's.
  """

  step: train.CompiledStep
  state: train_step.TrainState
  batch: tuple[jax.Array, jax.Array]
  key: jax.Array


def noise(
  batch_size: int, image_shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """The same uint8[B, H, W, C] and int32[B] under 10 at every call."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (batch_size, *image_shape), np.uint8)
  return images, rng.integers(0, 10, batch_size, np.int32)


def prepare(
  config: ConfigDict,
  experiment: train_step.Experiment,
  images: np.ndarray,
  labels: np.ndarray,
  mesh: Mesh,
) -> Resident:
  """A step on one batch that is all there is to train on.

  Args:
    config: the experiment's.
    experiment: from `experiment.build`.
    images: uint8[B, H, W, C], a whole batch.
    labels: int32[B].
    mesh: the devices.
  """
  split = record.whole_split(images, labels)
  batch = mesh_lib.shard_batch(mesh, images, labels)
  return _prepare(config, experiment, split, batch, mesh)


def prepare_on_data(
  config: ConfigDict,
) -> tuple[Resident, Callable[[int], Iterator[Any]]]:
  """A step on the configuration's own data, on all devices.

  Args:
    config: the experiment's; checked here.

  Returns:
    The step, whose batch is the first of epoch 0, and a function that gives
    the batches of an epoch and of all that follow.
  """
  config_rules.check(config, num_devices=jax.device_count())
  mesh = mesh_lib.create_mesh()
  dataset = datasets.load(config.dataset)

  def batches_from(first_epoch: int) -> Iterator[Any]:
    return itertools.chain.from_iterable(
      train.epoch_batches(
        dataset.train, config.batch_size, config.seed, epoch, mesh
      )
      for epoch in itertools.count(first_epoch)
    )

  experiment = experiment_lib.build(config)
  batch = next(batches_from(0))
  prepared = _prepare(config, experiment, dataset.train, batch, mesh)
  return prepared, batches_from


def _prepare(
  config: ConfigDict,
  experiment: train_step.Experiment,
  split: record.Split,
  batch: tuple[jax.Array, jax.Array],
  mesh: Mesh,
) -> Resident:
  """Initialises and compiles as `train.train_and_evaluate` does."""
  key = train.augmentation_key(config.seed, mesh)
  state = train.initial_state(config, experiment, split, mesh)
  step = train.compile_train_step(experiment, state, len(batch[1]), key, mesh)
  return Resident(step, state, batch, key)
