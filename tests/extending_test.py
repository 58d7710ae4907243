"""docs/extending.md: every diff applies to the code as it is, and trains."""

import compileall
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from resnet_flax.run import checkpoint

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
EDITS = re.findall(
  r"^## ([^\n]+)\n.*?```diff\n(.*?)```\n\nTrained with: `([^`]*)`",
  PAGE,
  re.DOTALL | re.MULTILINE,
)
SMALL = (
  *("--config=configs/quickstart.py", "--workdir=run"),
  *("--config.batch_size=16", "--config.dataset.train_examples=64"),
  *("--config.model.num_filters=8", "--config.log.tensorboard=False"),
)
# Edits that are trained together, by the first words of their titles.
GROUPS = SCORES, STEPS, BLOCKS, FREEZING = (
  ("A new metric", "Scoring by an image"),
  ("Any Optax", "A learning-rate", "An augmentation", "Another norm"),
  ("A block", "A branch that"),
  ("Freezing",),
)


def test_the_page_has_nine_edits():
  assert len(EDITS) == 9
  assert PAGE.count("```diff") == 9


def test_each_edit_is_in_one_group():
  groups = [sum(map(title.startswith, GROUPS)) for title, *_ in EDITS]
  assert groups == [1] * len(EDITS)


@pytest.fixture
def checkout(tmp_path):
  """A copy of the package and its configurations."""
  for name in ("resnet_flax", "configs"):
    shutil.copytree(
      ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__")
    )
  return tmp_path


def apply(checkout, diff):
  command = ["git", "apply", "-p0", "-"]
  subprocess.run(command, input=diff.encode(), cwd=checkout, check=True)


def apply_all(checkout, group):
  """Applies a group's edits; returns the arguments of all of them."""
  options = []
  for title, diff, arguments in EDITS:
    if title.startswith(group):
      apply(checkout, diff)
      options += arguments.split() if arguments.startswith("--") else []
  return options


def train(checkout, *arguments, num_epochs):
  environment = os.environ | {"PYTHONPATH": str(checkout)}
  command = [
    *(sys.executable, "-m", "resnet_flax.main", *SMALL),
    *(f"--config.num_epochs={num_epochs}", *arguments),
  ]
  done = subprocess.run(
    command, cwd=checkout, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  log = (checkout / "run" / "metrics.jsonl").read_text()
  records = [json.loads(line) for line in log.splitlines()]
  assert records[-1]["train_loss"] > 0
  assert 0 <= records[-1]["test_accuracy"] <= 1
  return records


def saved(workdir):
  """The arrays of a run's latest checkpoint, by name."""
  folders = (workdir / "checkpoints").iterdir()
  folder = max(folders, key=lambda each: int(each.name))
  forms = json.loads((folder / "manifest.json").read_text())["arrays"]
  like = {}
  for name, form in forms.items():
    dtype, _, sides = form.partition("[")
    like[name] = jax.ShapeDtypeStruct(json.loads(f"[{sides}"), dtype)
  return checkpoint.restore(workdir, int(folder.name), like)[0]


@pytest.mark.parametrize(
  ("title", "diff"), [(t, d) for t, d, _ in EDITS], ids=[t for t, *_ in EDITS]
)
def test_the_diff_applies(checkout, title, diff):
  """It applies to the current code, so that the page stays correct."""
  apply(checkout, diff)
  # A hunk may apply in a wrong place.
  assert compileall.compile_dir(checkout / "resnet_flax", quiet=1)


@pytest.mark.slow
def test_the_edits_of_scores_train(checkout):
  # A workdir of before is resumed.
  _, before = train(checkout, num_epochs=2)
  log = checkout / "run" / "metrics.jsonl"
  log.write_text(log.read_text().splitlines(keepends=True)[0])
  shutil.rmtree(checkout / "run" / "checkpoints" / "8")
  options = apply_all(checkout, SCORES)
  first, second = train(checkout, *options, num_epochs=2)
  assert "test_confidence" not in first
  # The most probable of ten classes has at least a tenth.
  for split in ("train", "test"):
    assert 0.1 <= second[f"{split}_confidence"] <= 1
  # The same network is scored in another way.
  assert second["train_loss"] == pytest.approx(before["train_loss"], rel=1e-4)
  assert second["test_loss"] != pytest.approx(before["test_loss"], rel=1e-3)


@pytest.mark.slow
def test_the_edits_of_steps_train(checkout):
  options = apply_all(checkout, STEPS)
  (record,) = train(checkout, *options, num_epochs=1)
  arrays = saved(checkout / "run")
  # A parabola's, before the last of four steps.
  config = json.loads((checkout / "run" / "config.json").read_text())
  rate = config["optimizer"]["learning_rate"] / 4**2
  assert record["learning_rate"] == pytest.approx(rate)
  assert (arrays["params/stage2_block1/bn1/LayerNorm_0/scale"] != 1).any()
  # Adam's first moment is of gradients that Optax has centred.
  path = "/mu/stage2_block1/conv1/kernel"
  (moment,) = (arrays[name] for name in arrays if name.endswith(path))
  assert np.abs(moment).max() > 1e-4
  np.testing.assert_allclose(moment.mean((1, 2, 3)), 0, atol=1e-6)


@pytest.mark.slow
def test_the_edits_of_blocks_train(checkout):
  options = apply_all(checkout, BLOCKS)
  train(checkout, *options, num_epochs=1)
  config = json.loads((checkout / "run" / "config.json").read_text())
  assert config["model"]["name"] == "linear_sum"
  # SkipInit's, one in each of the blocks, have left 0.
  scales = [
    array
    for name, array in saved(checkout / "run").items()
    if name.startswith("params/") and name.endswith("/branch/scale")
  ]
  assert len(scales) == 12
  assert all(scales)


@pytest.mark.slow
def test_frozen_blocks_keep_weights_and_statistics(checkout):
  """They equal the values of a run without the edit, also in loops."""
  train(checkout, "--config.model.depth=20", num_epochs=1)
  (checkout / "run").rename(checkout / "before")
  options = apply_all(checkout, FREEZING)
  train(checkout, "--config.init_from=before", *options, num_epochs=1)
  before, after = (saved(checkout / name) for name in ("before", "run"))
  for kind in ("params", "batch_stats"):
    for name in before:
      if name.startswith(f"{kind}/stage1_block"):
        is_same = np.array_equal(before[name], after[name])
        assert is_same == (name[len(f"{kind}/stage1_block")] in "12"), name
