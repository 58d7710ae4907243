"""The measurement of several seeds, with steps that take fixed times."""

from ml_collections import ConfigDict

from experiments.seeds import measurement
from experiments.tools import timing
from experiments.tools.markdown import spread_table


def test_every_way_trains_all_seeds(tiny_config, monkeypatch):
  now = [0.0]
  prepared = []

  class Resident:
    def __init__(self, config, seconds):
      self._seconds = seconds * config.num_seeds
      prepared.append((config.seed, config.num_seeds))

    def train(self, steps):
      now[0] += self._seconds * steps

  def prepare(config, execution="in_turn"):
    return Resident(config, 2.0 if execution == "vectorized" else 1.0)

  monkeypatch.setattr(timing, "prepare", prepare)
  monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
  config = ConfigDict(tiny_config.to_dict() | {"seed": 4, "num_seeds": 3})
  speeds = measurement.measure_steps(config, rounds=2, steps=5)
  assert sorted(prepared) == [(4, 1), (4, 3), (4, 3), (5, 1), (6, 1)]
  # Batches of 8, at 1 and at 2 s.
  assert speeds == {
    measurement.ALONE: [8.0] * 2,
    measurement.IN_TURN: [8.0] * 2,
    measurement.VECTORIZED: [4.0] * 2,
  }


def test_table():
  rows = [("speed, images/s", [1.0, 4.0, 2.0], ".1f")]
  assert spread_table(rows).splitlines()[2:] == [
    "| speed, images/s | 2.0 | 1.0 | 4.0 |"
  ]
  results = {
    "steps": {
      measurement.ALONE: [2.0],
      measurement.IN_TURN: [2.0],
      measurement.VECTORIZED: [1.0],
    },
    "runs": {"one program": [10.0], "a program for each": [25.0]},
  }
  lines = measurement.table(results).splitlines()
  assert "| vectorized / one after another | 0.500 | 0.500 | 0.500 |" in lines
  assert "| a program for each / one program | 2.500 | 2.500 | 2.500 |" in lines
