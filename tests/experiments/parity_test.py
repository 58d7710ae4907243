"""What is measured beside the Keras example, and how it is compared."""

import collections
import json
import pathlib

import numpy as np
import pytest
import scipy.stats

from configs import v1_depth20
from experiments.parity import checks, report
from resnet_flax.data import types
from resnet_flax.run import errors
from tests.helpers import run_module
from tests.tools.report import workdirs

FOLDER = pathlib.Path(report.__file__).parent
# The lines that are looked for, in words of our own.
EXAMPLE = """
epochs = 200
def lr_schedule(epoch):
  rate = 1e-3
  if epoch > 180:
    rate = 5e-7
  elif epoch > 160:
    rate = 1e-6
  elif epoch > 120:
    rate = 1e-5
  elif epoch > 80:
    rate = 1e-4
  print(rate)
  return rate
datagen = ImageDataGenerator(
  width_shift_range=0.1, height_shift_range=0.1, horizontal_flip=True
)
chosen_by = dict(monitor='val_acc')
"""


@pytest.fixture(scope="module")
def keras_example():
  pytest.importorskip("keras", reason="needs the extra [parity]")
  from experiments.parity import keras_example

  return keras_example


def test_the_schedule_is_scaled_as_ours(keras_example, monkeypatch):
  source = keras_example.scaled(EXAMPLE, 20)
  assert "epochs = 20\n" in source
  assert "monitor='val_accuracy'" in source
  schedule, _ = keras_example.parts(source)
  rates = [schedule(epoch) for epoch in range(20)]
  expected = [1e-3] * 9 + [1e-4] * 4 + [1e-5] * 4 + [1e-6] * 2 + [5e-7]
  assert rates == expected
  monkeypatch.setattr(checks, "EPOCHS", 20)
  config = v1_depth20.get_config()
  config.num_epochs = 20
  np.testing.assert_allclose(checks._rates(config), expected, rtol=1e-6)
  with pytest.raises(SystemExit, match="occurs 0 times"):
    keras_example.scaled(EXAMPLE.replace("200", "100"), 20)


@pytest.mark.filterwarnings("ignore:Please import `affine_transform`")
def test_checks_see_what_differs(keras_example, monkeypatch, tmp_path):
  for module in (keras_example, checks):
    monkeypatch.setattr(module, "DRAWS", 300)
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
  split = types.whole_split(pixels, np.zeros(4, np.int32))
  images = checks.images(types.Dataset(split, None, split, (), ""))
  assert abs(images.mean()) < 1e-6
  np.savez(tmp_path / "images.npz", images=images)
  theirs = keras_example.checks(EXAMPLE, tmp_path / "images.npz")
  found = checks.compare(v1_depth20.get_config(), images, theirs)
  assert found["largest_z"] < 6
  assert found["largest_relative_difference_of_rates"] < 1e-6
  assert found["theirs_every_epoch_is_another_permutation"]
  assert found["ours_every_epoch_is_another_permutation"]
  # Another shift, another order, another schedule.
  other = EXAMPLE.replace("0.1", "0.3").replace("> 120", "> 121")
  theirs = keras_example.checks(other, tmp_path / "images.npz")
  theirs["orders"][2] = theirs["orders"][1]
  found = checks.compare(v1_depth20.get_config(), images, theirs)
  assert found["largest_z"] > 6
  assert found["largest_relative_difference_of_rates"] > 0.5
  assert not found["theirs_every_epoch_is_another_permutation"]


def test_the_readme_says_what_the_checks_found():
  found = json.loads((FOLDER / "checks.json").read_text())
  text = " ".join((FOLDER / "README.md").read_text().split())
  assert found["largest_z"] < 5
  low, high = found["deviations"]
  assert max(1 - low, high - 1) < 0.1
  assert f"has {found['largest_z']:.1f} standard errors" in text
  assert f"and {found['share_of_z_above_1.96']:.1%} have" in text.replace(
    " %", "%"
  )
  assert f"{low:.2f} to {high:.2f} times" in text
  assert found["largest_relative_difference_of_rates"] < 5e-8
  assert found["theirs_every_epoch_is_another_permutation"]
  assert found["ours_every_epoch_is_another_permutation"]


def record(accuracy):
  values = dict.fromkeys(report._KEPT, 1.0)
  return values | {"test_accuracy": accuracy, "epoch": 0}


def finish(folder, accuracies, **overrides):
  """A run with the checkpoint of its last epoch."""
  workdirs.write(folder, accuracies, **overrides)
  (folder / "checkpoints" / str(100 * len(accuracies))).mkdir(parents=True)


def test_finished_seeds_are_compared(tmp_path):
  sides = [0.5, 0.52, 0.51], [0.52, 0.53, 0.57]
  for seed, (theirs, ours) in enumerate(zip(*sides, strict=True)):
    lines = [json.dumps(record(each)) + "\n" for each in (0.6, theirs)]
    (tmp_path / f"keras-seed{seed}.jsonl").write_text("".join(lines))
    (tmp_path / f"keras-seed{seed}.environment.json").write_text("{}")
    folder = tmp_path / f"ours-seed{seed}"
    finish(folder, [0.6, ours], seed=seed, num_epochs=2)
  # These are not finished.
  (tmp_path / "keras-seed3.part").write_text(json.dumps(record(0.1)) + "\n")
  workdirs.write(tmp_path / "ours-seed3", [0.1], seed=3, num_epochs=2)
  results = report.collect(tmp_path)
  programs = collections.Counter(each["program"] for each in results)
  assert programs == {"Keras": 3, "resnet_flax": 3}
  row = report.table(results).splitlines()[2]
  test = scipy.stats.ttest_ind(
    [52, 53, 57], [50, 52, 51], equal_var=False
  ).confidence_interval(0.95)
  assert row == (
    "| last epoch's test accuracy, % | 51.00 ± 1.00 (n = 3) |"
    " 54.00 ± 2.65 (n = 3)"
    f" | +3 ({test.low:+.3g} to {test.high:+.3g}) |"
  )
  assert len(report.draw(results).axes[0].get_lines()) == 6


def test_the_trainings_of_one_side_are_shown(tmp_path):
  """The other side's trainings may come from another day's --workdir."""
  finish(tmp_path / "ours-seed0", [0.6, 0.7], num_epochs=2)
  results = report.collect(tmp_path)
  row = report.table(results).splitlines()[2]
  assert "accuracy, % | – (n = 0) | 70.00 (n = 1) | – |" in row
  assert len(report.draw(results).axes[0].get_lines()) == 1
  finish(tmp_path / "ours-seed1", [0.6], seed=1, num_epochs=1)
  with pytest.raises(ValueError, match="unequal length"):
    report.table(report.collect(tmp_path))
  (tmp_path / "keras-seed2.jsonl").write_text(json.dumps(record(0.1)) + "\n")
  with pytest.raises(
    errors.DataError, match=r"seed2\.environment\.json is missi"
  ):
    report.collect(tmp_path)
  finish(tmp_path / "other", [0.6], num_epochs=1, model__depth=32)
  with pytest.raises(errors.WorkdirError, match=r"model\.depth"):
    report.collect(tmp_path)


@pytest.mark.parametrize(
  ("more", "message"),
  [
    ((), "pass --workdir=DIR, or --checks"),
    (("--checks",), "--example=missing.py must be the example's file"),
  ],
)
def test_a_mistake_is_named(more, message):
  arguments = ["--example=missing.py", "--keras_python=y", *more]
  ended = run_module("experiments.parity", *arguments)
  assert ended.returncode == 2
  assert message in ended.stderr
