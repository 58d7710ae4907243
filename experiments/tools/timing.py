"""Prepares training steps, and times actions that take turns."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_flax import data, train
from resnet_flax.data import types
from resnet_flax.parallel import networks, program
from resnet_flax.run import experiment as experiment_lib, rules


@dataclasses.dataclass
class Trainer:
  """Our training step, as the main command compiles it, and its state."""

  layout: networks.Layout
  training: program.Program  # Its step donates `state`.
  state: networks.Networks  # The states before the next step.
  batch: program.Batch  # Epoch 0's first batch, which stays on the devices.
  batches: Iterator[program.Batch]  # The batches of all epochs.

  def train(self, steps: int) -> list[dict[str, Any]]:
    """Takes steps on the next batches; returns sums as `repeat` does."""
    return self._train(itertools.islice(self.batches, steps))

  def repeat(self, steps: int) -> list[dict[str, Any]]:
    """Takes steps on `batch`; returns the seeds' epoch sums, on the host."""
    return self._train(itertools.repeat(self.batch, steps))

  def _train(self, batches: Iterable[program.Batch]) -> list[dict[str, Any]]:
    """Reads metrics one step late, as training does."""
    pending = None
    for batch in batches:
      self.state, metrics = self.training.step(self.state, batch)
      if pending is not None:
        self.layout.get(pending)
      pending = metrics
    assert pending is not None  # There is a batch.
    return [each.sums for each in self.layout.get(pending)]


def noise(config: ConfigDict) -> data.Split:
  """A split of one batch, uint8[B, H, W, C] and int32[B], always the same."""
  rng = np.random.default_rng(0)
  experiment = experiment_lib.build(config)
  shape = (config.batch_size, *experiment.image_shape)
  images = rng.integers(0, 256, shape, np.uint8)
  labels = rng.integers(0, experiment.num_classes, config.batch_size, np.int32)
  return types.whole_split(images, labels)


def prepare(
  config: ConfigDict,
  split: data.Split | None = None,
  devices: Sequence[jax.Device] | None = None,
  execution: str = "in_turn",
) -> Trainer:
  """Initialises and compiles as `train.train_and_evaluate` does.

  The defaults are the configuration's training split and all devices.
  """
  devices = list(devices or jax.devices())
  rules.check(config, num_devices=len(devices))
  experiment = experiment_lib.build(config)
  layout = networks.Layout.create(config, devices, execution)
  split = split or data.load(config.dataset).train
  key = train.augmentation_key(layout)
  state = train.initial_state(config, experiment, split, layout)
  training = program.create(config, experiment, state, split, key, layout)
  batches = itertools.chain.from_iterable(
    training.batches(epoch, 0) for epoch in itertools.count()
  )
  return Trainer(layout, training, state, next(training.batches(0, 0)), batches)


def in_turn(
  actions: Mapping[Any, Callable[[], object]], rounds: int
) -> dict[Any, list[float]]:
  """Seconds of each action in each round, after a warm-up round.

  The order alternates, so that the machine's drift favours no action.
  """
  seconds: dict[Any, list[float]] = {name: [] for name in actions}
  for round_number in range(rounds + 1):
    for name in sorted(actions, reverse=bool(round_number % 2)):
      started = time.perf_counter()
      actions[name]()
      if round_number:
        seconds[name].append(time.perf_counter() - started)
  return seconds
