"""Prepares training steps and orders their timings."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_flax import data, step as step_lib, train
from resnet_flax.data import types
from resnet_flax.parallel import networks, program
from resnet_flax.run import experiment as experiment_lib, rules


@dataclasses.dataclass
class Trainer:
  """Our training step, compiled as by the main command, and its state.

  Attributes:
    layout: the networks' layout on the devices.
    training: the compiled step, which donates `state`, and its batches.
    state: the state before the next step.
    batch: one batch, which stays on the devices.
  """

  layout: networks.Layout
  training: program.Program
  state: networks.Networks
  batch: program.Batch

  def train(self, batches: Iterable[program.Batch]) -> list[dict[str, Any]]:
    """Takes one step for each batch; reads metrics as training does.

    Returns:
      For each seed, the epoch's sums after the last step, on the host.
    """
    pending = None
    for batch in batches:
      self.state, metrics = self.training.step(self.state, batch)
      if pending is not None:
        self.layout.get(pending)
      pending = metrics
    assert pending is not None  # There is a batch.
    return [each.sums for each in self.layout.get(pending)]


def noise(
  batch_size: int, image_shape: tuple[int, ...], num_classes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
  """Draws uint8[B, H, W, C] images and int32[B] labels, always the same."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (batch_size, *image_shape), np.uint8)
  return images, rng.integers(0, num_classes, batch_size, np.int32)


def prepare(
  config: ConfigDict,
  experiment: step_lib.Experiment,
  images: np.ndarray,
  labels: np.ndarray,
  devices: Sequence[jax.Device] | None = None,
) -> Trainer:
  """Prepares a step on a data set of one batch."""
  layout = networks.Layout.create(config, devices)
  split = types.whole_split(images, labels)
  return _prepare(config, experiment, split, layout)


def prepare_on_data(
  config: ConfigDict,
  execution: str = "in_turn",
  devices: Sequence[jax.Device] | None = None,
) -> tuple[Trainer, Callable[[int], Iterator[program.Batch]]]:
  """Prepares a step on the configuration's own data.

  Returns:
    The step, whose batch is the first of epoch 0, and a function that yields
    the batches of an epoch and of all later epochs.
  """
  devices = list(devices or jax.devices())
  rules.check(config, num_devices=len(devices))
  layout = networks.Layout.create(config, devices, execution)
  split = data.load(config.dataset).train
  trainer = _prepare(config, experiment_lib.build(config), split, layout)

  def batches_from(epoch: int) -> Iterator[program.Batch]:
    return itertools.chain.from_iterable(
      trainer.training.batches(k, 0) for k in itertools.count(epoch)
    )

  return trainer, batches_from


def _prepare(
  config: ConfigDict,
  experiment: step_lib.Experiment,
  split: data.Split,
  layout: networks.Layout,
) -> Trainer:
  """Initialises and compiles as `train.train_and_evaluate` does."""
  key = train.augmentation_key(layout)
  state = train.initial_state(config, experiment, split, layout)
  training = program.create(config, experiment, state, split, key, layout)
  return Trainer(layout, training, state, next(training.batches(0, 0)))


def in_turn(names: Iterable[str], rounds: int) -> Iterator[tuple[int, str]]:
  """Yields each name once a round, in an order that alternates.

  The order alternates so that the machine's drift favours no name.

  Args:
    names: names of the measurements.
    rounds: number of counted rounds, after a warm-up round.

  Yields:
    (round, name). Round 0 is the warm-up: its measurements do not count.
  """
  for round_number in range(rounds + 1):
    for name in sorted(names, reverse=bool(round_number % 2)):
      yield round_number, name
