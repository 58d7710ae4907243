"""The measurement of several devices, with steps that take fixed times."""

import pytest

from experiments.devices import measurement
from experiments.tools import timing


@pytest.fixture
def prepared(monkeypatch):
  """The prepared calls; a step takes a second, and one more for each device."""
  now = [0.0]
  prepared = []

  class Resident:
    def __init__(self, num_devices):
      self._num_devices = num_devices

    def train(self, steps):
      now[0] += (1 + self._num_devices) * steps
      # A loss that depends on the number of devices, by rounding.
      loss = 10.0 * (1 + 1e-7 * (self._num_devices - 1))
      return [{"loss": loss, "count": 5}]

  def prepare(config, devices):
    prepared.append((config.batch_size, len(devices)))
    return Resident(len(devices))

  monkeypatch.setattr(timing, "prepare", prepare)
  monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
  return prepared


def test_each_batch_is_trained_on_its_devices_and_on_one(tiny_config, prepared):
  measured = measurement.measure(
    tiny_config, [1, 3], per_device=4, rounds=2, steps=5
  )
  assert prepared == [(4, 1), (12, 1), (12, 3)]
  one, three = measured
  assert (one["devices"], one["batch_size"]) == (1, 4)
  assert one["images_per_second"] == one["alone"] == [2.0, 2.0]
  assert one["loss_differences"] == [0] * 4
  assert (three["devices"], three["batch_size"]) == (3, 12)
  assert three["images_per_second"] == [3.0, 3.0]
  assert three["alone"] == [6.0, 6.0]
  assert three["loss_differences"] == pytest.approx([2e-7] * 4, rel=1e-3)
  assert measurement.table(measured).splitlines()[2:] == [
    "| 1 | 4 | 2 | 1.00 (1.00–1.00) | 1.00 (1.00–1.00) |"
    " 0e+00, 0e+00, 0e+00, 0e+00 |",
    "| 3 | 12 | 3 | 0.50 (0.50–0.50) | 1.50 (1.50–1.50) |"
    " 2e-07, 2e-07, 2e-07, 2e-07 |",
  ]
  # The experiment's own batch size is left alone.
  assert tiny_config.batch_size == 8
