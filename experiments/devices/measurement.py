"""Compares speeds and losses of a batch on several devices and on one."""

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.tools import markdown
from experiments.tools.timing import in_turn, prepare_on_data

# Only the losses of the first steps are compared: Adam amplifies rounding
# errors in later ones.
_COMPARED_STEPS = 4

_COLUMNS = (
  "devices",
  "batch",
  "images/s",
  "÷ one device, same batch",
  "÷ one device, its own batch",
  "difference of the loss after 1, 2, ... steps",
)


class _Trained:
  """A training step on some devices, with its state and its batches."""

  def __init__(self, config: ConfigDict, num_devices: int):
    devices = jax.devices()[:num_devices]
    self._resident, batches_from = prepare_on_data(config, devices=devices)
    self._batches = batches_from(0)
    self._batch_size = config.batch_size

  def first_losses(self) -> list[float]:
    """The epoch's mean loss after each of its first steps."""
    losses = []
    for batch in itertools.islice(self._batches, _COMPARED_STEPS):
      (sums,) = self._resident.train([batch])
      losses.append(float(sums["loss"] / sums["count"]))
    return losses

  def images_per_second(self, steps: int) -> float:
    """Trains the next steps and returns their speed."""
    started = time.perf_counter()
    self._resident.train(itertools.islice(self._batches, steps))
    return steps * self._batch_size / (time.perf_counter() - started)


def measure(
  config: ConfigDict,
  numbers: Sequence[int],
  per_device: int,
  rounds: int,
  steps: int,
) -> list[dict[str, Any]]:
  """Trains the same batches on several devices and on one device.

  Args:
    config: the experiment's; its batch size is replaced.
    numbers: device counts.
    per_device: images for each device.
    rounds: measurements of each setting, in turn, after a warm-up round.
    steps: training steps of one measurement.

  Returns:
    For each device count, as JSON: `devices`, `batch_size`, images/s of each
    round on these devices and on one (`alone`), and `loss_differences`: the
    relative difference of the epoch's mean loss after each of the first steps.
  """
  trained: dict[str, _Trained] = {}
  losses = {}
  for number in numbers:
    of_batch = ConfigDict(config)
    of_batch.batch_size = number * per_device
    for devices in sorted({1, number}):
      name = _name(number, devices)
      trained[name] = _Trained(of_batch, devices)
      losses[name] = trained[name].first_losses()
  speeds: dict[str, list[float]] = {name: [] for name in trained}
  for round_number, name in in_turn(trained, rounds):
    speed = trained[name].images_per_second(steps)
    if round_number:
      speeds[name].append(speed)
  measured = []
  for number in numbers:
    shared, alone = _name(number, number), _name(number, 1)
    pairs = zip(losses[shared], losses[alone], strict=True)
    measured.append(
      {
        "devices": number,
        "batch_size": number * per_device,
        "images_per_second": speeds[shared],
        "alone": speeds[alone],
        "loss_differences": [abs(a / b - 1) for a, b in pairs],
      }
    )
  return measured


def _name(batch: int, devices: int) -> str:
  return f"{batch:05d} shares on {devices}"


def table(measured: Sequence[dict[str, Any]]) -> str:
  """Formats results as Markdown: medians, and ranges of the ratios.

  Args:
    measured: from `measure`, sorted by device count.
  """
  rows = []
  (first, *_) = measured
  for each in measured:
    speeds = each["images_per_second"]
    cells = (
      each["devices"],
      each["batch_size"],
      f"{statistics.median(speeds):.0f}",
      _ratios(speeds, each["alone"]),
      _ratios(speeds, first["alone"]),
      ", ".join(f"{value:.0e}" for value in each["loss_differences"]),
    )
    rows.append(cells)
  return markdown.table(_COLUMNS, rows)


def _ratios(ones: Sequence[float], others: Sequence[float]) -> str:
  ratios = [a / b for a, b in zip(ones, others, strict=True)]
  return markdown.spread(ratios, ".2f")
