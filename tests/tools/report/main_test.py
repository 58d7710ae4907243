"""The command line as a user meets it."""

import pathlib
import subprocess
import sys

import pytest

from tests.tools.report import workdirs

ROOT = pathlib.Path(__file__).parents[3]
WITHOUT_MATPLOTLIB = """
import runpy, sys
sys.modules["matplotlib"] = None
runpy.run_module("resnet_flax.report", run_name="__main__", alter_sys=True)
"""


def run(*arguments, start=("-m", "resnet_flax.report")):
  return subprocess.run(
    [sys.executable, *start, *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )


def refusal(ended):
  """The one line that a command line is refused with."""
  assert ended.stdout == ""
  (line,) = ended.stderr.splitlines()
  assert ended.returncode in (1, 2)
  return line


def test_report(tmp_path):
  workdirs.write(tmp_path / "a", seed=0)
  workdirs.write(tmp_path / "b", seed=1)
  out = tmp_path / "out"
  ended = run(tmp_path / "a", f"--out={out}", tmp_path / "b")
  # Without a checkpoint: a line that says so, and no failure.
  assert ended.returncode == 0
  (line,) = ended.stderr.splitlines()
  assert line.startswith("warning: the report lacks the checkpoint of group 1")
  assert ended.stdout == f"Runs: 2\nGroups: 1\nPage: {out}/index.html\n"
  assert "60.00 ± 0.00" in (out / "index.html").read_text()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--out=out"], "error: the following arguments are required: FOLDER"),
    (["{runs}"], "error: the following arguments are required: --out"),
    (
      ["{runs}", "--out=out", "--workdir=x"],
      "error: unrecognized arguments: --workdir=x",
    ),
  ],
)
def test_mistakes_end_in_one_line(tmp_path, arguments, message):
  workdirs.write(tmp_path / "run")
  line = refusal(run(*(text.format(runs=tmp_path) for text in arguments)))
  assert message in line
  assert not (ROOT / "out").exists()


def test_without_matplotlib(tmp_path):
  workdirs.write(tmp_path / "run")
  arguments = [tmp_path / "run", f"--out={tmp_path / 'out'}"]
  ended = run(*arguments, start=("-c", WITHOUT_MATPLOTLIB))
  assert "pip install 'resnet_flax[report]'" in refusal(ended)
  assert not (tmp_path / "out").exists()
