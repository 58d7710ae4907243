"""The rules of the degradation experiment, on errors that are made up."""

import numpy as np
import pytest
import scipy.stats

from experiments.depth_ablation import report
from resnet_flax import train
from resnet_flax.run import errors, load
from tests.helpers import changed

# Of five seeds, in percent.
NOISE = (0.0, 0.3, -0.2, 0.1, -0.1)


def make_cells(seeds=5, **errors):
  """Cells whose final training errors are near the given ones."""
  cells = []
  for key, error in errors.items():
    network, _, depth = key.rpartition("_")
    for seed in range(seeds):
      final = error + NOISE[seed] * (int(depth) / 56)
      # Flat: the last eight epochs change nothing.
      curve = [80.0, *[final] * 9]
      cells.append(
        {
          "network": network,
          "depth": int(depth),
          "seed": seed,
          "train_error": final,
          "test_error": final + 20,
          "train_errors": curve,
          "test_errors": [e + 20 for e in curve],
        }
      )
  return cells


def shown(cells):
  rows = report.table(cells).splitlines()[-2:]
  return [row.split("|")[-2].strip() for row in rows]


CLEAR = {"plain_20": 10, "plain_56": 15, "resnet_v1_20": 2, "resnet_v1_56": 1}


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({}, ["degradation", "no degradation"]),
    ({"plain_56": 10.05}, ["not shown", "no degradation"]),
    ({"plain_56": 8}, ["not shown", "no degradation"]),
    ({"resnet_v1_56": 2.9}, ["degradation", "not shown"]),
    ({"resnet_v1_56": 2.5}, ["degradation", "no degradation"]),
    ({"seeds": 4}, ["not yet: 4 of 5 seeds"] * 2),
  ],
)
def test_what_is_shown(changes, expected):
  assert shown(make_cells(**CLEAR | changes)) == expected


def test_differences_without_a_spread_are_judged():
  """Networks that fit all of their images have no error at either depth."""
  cells = make_cells(**CLEAR)
  for cell in cells:
    if cell["network"] == "resnet_v1":
      cell["train_error"] = 0.0
  assert shown(cells) == ["degradation", "no degradation"]


def test_a_network_that_still_learns_does_not_show_degradation():
  cells = make_cells(**CLEAR)
  for cell in cells:
    cell["train_errors"] = [cell["train_error"] + 0.2 * k for k in range(9)]
  assert shown(cells) == ["not shown", "no degradation"]


def test_intervals_are_paired_by_seed():
  cells = make_cells(**CLEAR)
  deep, shallow = (
    [c["train_error"] for c in cells if (c["network"], c["depth"]) == key]
    for key in (("plain", 56), ("plain", 20))
  )
  test = scipy.stats.ttest_rel(deep, shallow).confidence_interval(0.95)
  row = report.table(cells).splitlines()[-2]
  assert f"| {test.low:+.1f} to {test.high:+.1f} | 5 |" in row
  mean = np.mean(np.array(deep) - shallow)
  assert f"| `plain` | {mean:.1f} ± " in row


@pytest.mark.parametrize(
  ("error", "expected"),
  [
    (9.9, "does not remain"),
    (10.05, "does not remain"),  # Seed 1 of plain-20 has 10.1.
    (10.3, "remains"),
  ],
)
def test_longer_run_is_held_against_every_shallow_network(error, expected):
  cells = make_cells(**CLEAR)
  before = report.table(cells)
  curve = [error] * report.longer.OVERRIDES["num_epochs"]
  cell = {"network": "plain", "depth": 56, "seed": 0, "train_error": error}
  cell |= {"test_error": 30, "train_errors": curve, "test_errors": curve}
  table = report.table([*cells, cell])
  assert table.startswith(before)
  row = table.splitlines()[-1]
  assert row == (
    f"| `plain` | 56 | 96 | 0 | {error:.1f} | 30.0 | degradation {expected} |"
  )
  assert len(report.draw([*cells, cell]).axes[0].get_lines()) == 2 * 4 * 5


def test_figure_has_two_curves_of_each_seed():
  (axis,) = report.draw(make_cells(**CLEAR)).axes
  assert len(axis.get_lines()) == 2 * 4 * 5
  assert len(axis.get_legend().get_texts()) == 4


@pytest.mark.slow
def test_finished_runs_are_scored_in_inference_mode(
  tiny_config, tmp_path, one_device, monkeypatch
):
  monkeypatch.setattr(
    report.v1_depth20, "get_config", lambda: changed(tiny_config)
  )
  monkeypatch.setattr(report.degradation, "OVERRIDES", {"num_epochs": 2})
  monkeypatch.setattr(report.degradation, "GRID", {"seed": [0, 1]})
  train.train_and_evaluate(tiny_config, tmp_path / "a", devices=one_device)
  (cell,) = report.collect(tmp_path)
  assert (cell["network"], cell["depth"], cell["seed"]) == ("resnet_v1", 8, 0)
  assert len(cell["train_errors"]) == len(cell["test_errors"]) == 2
  # All 32 images, with the final weights.
  scores = load.evaluate_workdir(tmp_path / "a", "latest", split="train")
  assert cell["train_error"] == pytest.approx(100 * (1 - scores["accuracy"]))
  monkeypatch.setattr(report.degradation, "OVERRIDES", {"num_epochs": 32})
  with pytest.raises(errors.WorkdirError, match=r"num_epochs \(2 there, 32 h"):
    report.collect(tmp_path)
  # As a run of longer.py.
  monkeypatch.setattr(report.longer, "OVERRIDES", {"num_epochs": 2})
  monkeypatch.setattr(report.longer, "GRID", {"seed": [1, 2]})
  with pytest.raises(errors.WorkdirError, match=r"seed \(0 there, 1 here"):
    report.collect(tmp_path)
