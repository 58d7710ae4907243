"""Our training step, compiled as by the main command, and one noise batch."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import (
  mesh as mesh_lib,
  randomness,
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
  """Initialises and compiles as `train.train_and_evaluate` does.

  Args:
    config: the experiment's.
    experiment: from `experiment.build`.
    images: uint8[B, H, W, C], a whole batch.
    labels: int32[B].
    mesh: the devices.
  """
  key = jax.device_put(
    randomness.device_key(config.seed, randomness.Purpose.AUGMENTATION),
    mesh_lib.replicated(mesh),
  )
  split = record.whole_split(images, labels)
  state = train.initial_state(config, experiment, split, mesh)
  step = train.compile_train_step(experiment, state, len(labels), key, mesh)
  return Resident(step, state, mesh_lib.shard_batch(mesh, images, labels), key)
