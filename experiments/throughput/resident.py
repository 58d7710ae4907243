"""Our training step, compiled as by the main command, and a resident batch."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_flax import (
  data as datasets,
  experiment as experiment_lib,
  step as train_step,
  train,
)
from resnet_flax.data import dataset as record
from resnet_flax.parallel import calls as calls_lib, epochs, networks as seeds
from resnet_flax.run import rules


@dataclasses.dataclass
class Resident:
  """What a step needs, on the devices.

  Attributes:
    layout: where it is.
    step: the compiled training step; it takes `state` away.
    state: before the next step.
    batch: uint8[B, H, W, C] and int32[B], sharded over the devices.
    key: key[], the augmentation's.
  """

  layout: seeds.Layout
  step: calls_lib.CompiledStep
  state: calls_lib.State
  batch: tuple[Any, Any]
  key: Any

  def train(self, batches: Iterable[Any]) -> list[train_step.MetricSums]:
    """Takes one step for each batch, as the main command does.

    Args:
      batches: `batch`, repeated, or those of `prepare_on_data`.

    Returns:
      For each seed the sums of the epoch after the last one, on the host.
    """
    self.state, last = calls_lib.train_steps(
      self.step,
      self.state,
      calls_lib.one_step_calls(batches, self.key),
      lambda _: None,
      layout=self.layout,
    )
    return [each.sums for each in last]


def noise(
  batch_size: int, image_shape: tuple[int, ...], num_classes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
  """The same uint8[B, H, W, C] images and int32[B] labels at every call."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (batch_size, *image_shape), np.uint8)
  return images, rng.integers(0, num_classes, batch_size, np.int32)


def prepare(
  config: ConfigDict,
  experiment: train_step.Experiment,
  images: np.ndarray,
  labels: np.ndarray,
  devices: Sequence[jax.Device] | None = None,
) -> Resident:
  """A step on one batch that is all there is to train on.

  Args:
    config: the experiment's.
    experiment: from `experiment.build`.
    images: uint8[B, H, W, C], a whole batch.
    labels: int32[B].
    devices: what to train on, by default all devices.
  """
  layout = seeds.Layout.create(config, devices)
  split = record.whole_split(images, labels)
  (batch,) = layout.batches(lambda _: [(images, labels)], len(labels))
  return _prepare(config, experiment, split, batch, len(labels), layout)


def prepare_on_data(
  config: ConfigDict,
  execution: str = "in_turn",
  devices: Sequence[jax.Device] | None = None,
) -> tuple[Resident, Callable[[int], Iterator[Any]]]:
  """A step on the configuration's own data.

  Args:
    config: the experiment's; checked here.
    execution: of several seeds, one of `seeds.EXECUTIONS`.
    devices: what to train on, by default all devices.

  Returns:
    The step, whose batch is the first of epoch 0, and a function that gives
    the batches of an epoch and of all that follow.
  """
  devices = list(devices or jax.devices())
  rules.check(config, num_devices=len(devices))
  layout = seeds.Layout.create(config, devices, execution)
  dataset = datasets.load(config.dataset)

  batch_size = config.batch_size
  batches_from = functools.partial(
    epochs.all_batches, dataset.train, batch_size, layout
  )
  experiment = experiment_lib.build(config)
  batch = next(batches_from(0))
  prepared = _prepare(
    config, experiment, dataset.train, batch, batch_size, layout
  )
  return prepared, batches_from


def _prepare(
  config: ConfigDict,
  experiment: train_step.Experiment,
  split: record.Split,
  batch: tuple[Any, Any],
  batch_size: int,
  layout: seeds.Layout,
) -> Resident:
  """Initialises and compiles as `train.train_and_evaluate` does."""
  key = train.augmentation_key(layout)
  state = train.initial_state(config, experiment, split, layout)
  step = calls_lib.compile_train_step(
    experiment, state, batch_size, key, layout
  )
  return Resident(layout, step, state, batch, key)
