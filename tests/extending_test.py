"""docs/extending.md: every diff applies to the code as it is, and trains."""

import compileall
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
EDITS = re.findall(
  r"^## ([^\n]+)\n.*?```diff\n(.*?)```\n\nTrained with: `([^`]*)`",
  PAGE,
  re.DOTALL | re.MULTILINE,
)
SMALL = (
  *("--config=configs/quickstart.py", "--workdir=run", "--config.num_epochs=2"),
  *("--config.batch_size=16", "--config.dataset.train_examples=64"),
  *("--config.model.num_filters=8", "--config.log.tensorboard=False"),
)


def test_the_page_has_nine_edits():
  assert len(EDITS) == 9
  assert PAGE.count("```diff") == 9


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


def train(checkout, *arguments):
  environment = os.environ | {"PYTHONPATH": str(checkout)}
  command = [sys.executable, "-m", "resnet_flax.main", *SMALL, *arguments]
  done = subprocess.run(
    command, cwd=checkout, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  log = (checkout / "run" / "metrics.jsonl").read_text()
  return [json.loads(line) for line in log.splitlines()]


@pytest.mark.parametrize(
  ("title", "diff"), [(t, d) for t, d, _ in EDITS], ids=[t for t, *_ in EDITS]
)
def test_the_diff_applies(checkout, title, diff):
  """To the code as it stands, so that the page cannot rot."""
  apply(checkout, diff)
  # A hunk may apply in a wrong place.
  assert compileall.compile_dir(checkout / "resnet_flax", quiet=1)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("title", "diff", "arguments"), EDITS, ids=[title for title, *_ in EDITS]
)
def test_the_edit_trains(checkout, title, diff, arguments):
  is_metric = title == "A new metric"
  if is_metric:
    # A workdir of before is resumed.
    train(checkout)
    log = checkout / "run" / "metrics.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    shutil.rmtree(checkout / "run" / "checkpoints" / "8")
  apply(checkout, diff)
  options = arguments.split() if arguments.startswith("--") else []
  first, second = train(checkout, *options)
  assert second["train_loss"] > 0
  assert 0 <= second["test_accuracy"] <= 1
  if is_metric:
    assert "test_confidence" not in first
    # The most probable of ten classes has at least a tenth.
    for split in ("train", "test"):
      assert 0.1 <= second[f"{split}_confidence"] <= 1
