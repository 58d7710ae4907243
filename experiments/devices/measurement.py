"""Compares speeds and losses of a batch on several devices and on one."""

import functools
import operator
import statistics
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.tools import markdown, timing

# Only the losses of the first steps are compared: later, Adam amplifies the
# rounding errors.
_COMPARED_STEPS = 4

_COLUMNS = (
  *("devices", "batch", "images/s", "÷ one device, same batch"),
  "÷ one device, its own batch",
  "difference of the loss after 1, 2, ... steps",
)


def measure(
  config: ConfigDict,
  numbers: Sequence[int],
  per_device: int,
  rounds: int,
  steps: int,
) -> list[dict[str, Any]]:
  """Trains the same batches on several devices and on one device.

  Each number of devices has a dict: `devices`, `batch_size`, images/s by round
  on these devices (`images_per_second`) and on one (`alone`), and the relative
  `loss_differences` of the epoch's mean loss after each of the first steps.
  """
  windows, losses = {}, {}
  for number in numbers:
    scaled_config = ConfigDict(config)
    scaled_config.batch_size = number * per_device
    for devices in sorted({1, number}):
      trainer = timing.prepare(scaled_config, devices=jax.devices()[:devices])
      windows[number, devices] = functools.partial(trainer.train, steps)
      sums = [trainer.train(1)[0] for _ in range(_COMPARED_STEPS)]
      losses[number, devices] = [
        float(each["loss"] / each["count"]) for each in sums
      ]
  seconds = timing.in_turn(windows, rounds)
  measured = []
  for number in numbers:
    shared, alone = (number, number), (number, 1)
    images = steps * number * per_device
    pairs = zip(losses[shared], losses[alone], strict=True)
    measured.append(
      {
        "devices": number,
        "batch_size": number * per_device,
        "images_per_second": [images / each for each in seconds[shared]],
        "alone": [images / each for each in seconds[alone]],
        "loss_differences": [abs(a / b - 1) for a, b in pairs],
      }
    )
  return measured


def table(measured: Sequence[dict[str, Any]]) -> str:
  """Formats what `measure` returns: medians, and ranges of the ratios."""
  rows = [
    (
      each["devices"],
      each["batch_size"],
      f"{statistics.median(each['images_per_second']):.0f}",
      _ratios(each["images_per_second"], each["alone"]),
      _ratios(each["images_per_second"], measured[0]["alone"]),
      ", ".join(f"{value:.0e}" for value in each["loss_differences"]),
    )
    for each in measured
  ]
  return markdown.table(_COLUMNS, rows)


def _ratios(ones: Sequence[float], others: Sequence[float]) -> str:
  return markdown.spread(list(map(operator.truediv, ones, others)), ".2f")
