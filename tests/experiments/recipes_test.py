"""What is kept of the recipes' runs, and the table and figure of it."""

import json
import pathlib
import shutil
import statistics

import numpy as np
import pytest

from configs import fast_cifar10
from experiments.recipes import report
from experiments.tools import markdown
from resnet_flax import train
from resnet_flax.run import folder
from resnet_flax.tools.report import intervals
from tests.helpers import changed

WITHOUT = "fast_cifar10,label_smoothing=0.0"


def make_runs():
  return [
    {
      "recipe": recipe,
      "seed": seed,
      "accuracies": [50.0, best + seed],
      "minutes": [7.0, 14.0 + seed],
      "images_per_second": 500.0,
      "unflipped": best - 1,
      "environment": {"cpu_model": "AMD EPYC"},
    }
    for recipe, best in (("fast_cifar10", 80.0), (WITHOUT, 78.0))
    for seed in range(3)
  ]


def test_table():
  assert report.table(make_runs()).splitlines()[2:] == [
    "| `fast_cifar10` | 2 | 81.00 ± 1.00 | 79.00 ± 0.00 | 3 | 500 | 14.0 |"
    " AMD EPYC |",
    f"| `{WITHOUT}` | 2 | 79.00 ± 1.00 | 77.00 ± 0.00 | 3 | 500 | 14.0 |"
    " AMD EPYC |",
  ]


def test_one_seed_has_no_deviation():
  (row,) = report.table(make_runs()[:1]).splitlines()[2:]
  assert row.startswith("| `fast_cifar10` | 2 | 80.00 | 79.00 | 1 |")


def test_figure_has_a_curve_of_each_seed():
  (axis,) = report.draw(make_runs()).axes
  assert len(axis.get_lines()) == 6
  assert len(axis.get_legend().get_texts()) == 2


@pytest.mark.slow
def test_finished_runs_are_collected(
  tiny_config, tmp_path, one_device, monkeypatch
):
  tiny_config.dataset.test_crops = 2
  usual = changed(tiny_config, label_smoothing=0.1, num_epochs=10)
  monkeypatch.setattr(fast_cifar10, "get_config", lambda: usual)
  point = {"num_epochs": 2, "label_smoothing": 0.0, "seed": 0}
  name = folder.default_name("configs/fast_cifar10.py", point)
  records = train.train_and_evaluate(
    tiny_config, tmp_path / name, devices=one_device
  )
  (run,) = report.collect(tmp_path)
  assert (run["recipe"], run["seed"]) == (WITHOUT, 0)
  assert run["accuracies"][-1] == pytest.approx(
    100 * records[-1]["test_accuracy"], abs=0.01
  )
  seconds = [r["epoch_seconds"] + r["evaluation_seconds"] for r in records]
  expected = [seconds[0] / 60, sum(seconds) / 60]
  assert run["minutes"] == pytest.approx(expected, abs=0.006)
  assert 0 <= run["unflipped"] <= 100
  # A run that has not ended, or lost its last checkpoint, is left out.
  shutil.rmtree(tmp_path / name / "checkpoints" / "8")
  assert report.collect(tmp_path) == []
  log = tmp_path / name / "metrics.jsonl"
  log.write_text(log.read_text().splitlines()[0] + "\n")
  assert report.collect(tmp_path) == []


def test_the_page_has_the_numbers_of_the_raw_file():
  folder = pathlib.Path(report.__file__).parent
  runs = json.loads((folder / "results.json").read_text())
  text = (folder / "README.md").read_text()
  table = report.table(runs)
  assert markdown.replace(text, "recipes", report.COMMAND, table) == text
  groups = {
    (name, len(group[0]["accuracies"])): group
    for name, group in report.by_recipe(runs)
  }
  fast, keras = groups["fast_cifar10", 10], groups["v1_depth20", 8]
  ends = [run["accuracies"][-1] for run in fast]
  reached = markdown.mean_and_std(ends, ".1f")
  text = " ".join(text.split())
  assert f"reaches {reached} % (mean ± standard deviation, n = 3)" in text
  assert len(fast) == 3
  reached = markdown.mean_and_std(
    [run["accuracies"][-1] for run in keras], ".1f"
  )
  minutes = f"{keras[0]['minutes'][-1]:.0f} minutes (n = {len(keras)})"
  assert f"reaches {reached} % in {minutes}" in text
  keras_ends = np.array([run["accuracies"][-1] for run in keras])
  for accuracies, said in (
    (np.array(ends), "{:.1f} points (95 % interval {:.1f} to {:.1f})"),
    (
      np.array([r["unflipped"] for r in fast]),
      "{:.1f} points ({:.1f} to {:.1f})",
    ),
  ):
    low, high, _ = intervals.interval(accuracies, keras_ends, paired=False)
    difference = accuracies.mean() - keras_ends.mean()
    assert f"difference is {said.format(difference, low, high)}" in text
  gain = statistics.mean(ends) - statistics.mean(r["unflipped"] for r in fast)
  assert f"give {gain:.1f} of these points" in text
