import json
import sys

import pytest
from matplotlib.figure import Figure

from experiments.depth_ablation import report as depth_ablation
from experiments.parity import report as parity
from experiments.recipes import report as recipes
from experiments.tools import runs
from tests.helpers import run_module
from tests.tools.report import workdirs


@pytest.mark.parametrize("report", [depth_ablation, parity, recipes])
@pytest.mark.parametrize("kind", ["missing", "empty", "unfinished"])
def test_a_folder_without_a_finished_run_changes_nothing(
  report, kind, tmp_path, monkeypatch, capsys
):
  """The committed figures stay, and one line says what is wrong."""
  folder = tmp_path / "runs"
  if kind != "missing":
    folder.mkdir()
  if kind == "unfinished":
    workdirs.write(folder / "a", [0.5], num_epochs=2)
    (folder / "keras-seed0.part").write_text("{}\n")
  monkeypatch.setattr(runs.files_lib, "write_json", None)
  monkeypatch.setattr(runs.markdown, "update", None)
  monkeypatch.setattr(sys, "argv", ["report", f"--workdir={folder}"])
  with pytest.raises(SystemExit) as caught:
    report.main()
  assert caught.value.code == 2
  what = "a folder of runs" if kind == "missing" else "a finished run"
  assert f"--workdir={folder} must " in (said := capsys.readouterr().err)
  assert what in said


@pytest.mark.parametrize("report", [depth_ablation, parity, recipes])
def test_a_run_of_other_settings_is_refused(
  report, tmp_path, monkeypatch, capsys
):
  workdirs.write(tmp_path / "a", [0.5], num_epochs=1, batch_size=8)
  (tmp_path / "a" / "checkpoints" / "100").mkdir(parents=True)
  monkeypatch.setattr(runs.files_lib, "write_json", None)
  monkeypatch.setattr(sys, "argv", ["report", f"--workdir={tmp_path}"])
  with pytest.raises(SystemExit) as caught:
    report.main()
  assert caught.value.code == 2
  *_, last = capsys.readouterr().err.splitlines()
  assert f"--workdir={tmp_path} cannot be used: " in last


@pytest.mark.parametrize("module", ["depth_cost", "faults"])
def test_no_result_is_overwritten(module, tmp_path):
  out = tmp_path / "results.json"
  out.write_text("kept")
  done = run_module(f"experiments.{module}", f"--out={out}")
  assert done.returncode == 2
  assert "exists already" in done.stderr.splitlines()[-1]
  assert out.read_text() == "kept"


def test_runs_of_earlier_workdirs_stay(tmp_path, monkeypatch, capsys):
  """A run replaces the one of its key; the table and the figure have all."""
  raw = tmp_path / "results.json"
  readme = tmp_path / "README.md"
  readme.write_text("<!-- it: made by us -->\n\n<!-- end of it -->\n")
  drawn = []

  def draw(kept):
    if any(run["value"] is None for run in kept):
      raise ValueError("no value")
    drawn.append(kept)
    return Figure()

  def report(*found):
    monkeypatch.setattr(sys, "argv", ["report", f"--workdir={tmp_path}"])
    runs.report(
      *("us", "it", raw, "curves.png"),
      collect=lambda workdir: [{"seed": k, "value": v} for k, v in found],
      key=lambda run: (run["seed"],),
      draw=draw,
      table=lambda kept: " ".join(f"{r['seed']}:{r['value']}" for r in kept),
    )

  report((10, "a"), (2, "b"))
  report((2, "c"), (3, "d"))
  with pytest.raises(SystemExit):
    report((4, None))
  assert "does not fit results.json: no value" in capsys.readouterr().err
  kept = json.loads(raw.read_text())
  assert kept == drawn[-1]
  assert "\n\n2:c 3:d 10:a\n\n" in readme.read_text()
