import sys

import pytest

from experiments.depth_ablation import report as depth_ablation
from experiments.parity import report as parity
from experiments.recipes import report as recipes
from experiments.tools import runs
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
    (folder / "keras-seed0.jsonl").write_text("{}\n")
  monkeypatch.setattr(runs.files_lib, "write_json", None)
  monkeypatch.setattr(runs.markdown, "update", None)
  monkeypatch.setattr(sys, "argv", ["report", f"--workdir={folder}"])
  with pytest.raises(SystemExit) as caught:
    report.main()
  assert caught.value.code == 2
  what = "a folder of runs" if kind == "missing" else "a finished run"
  assert f"--workdir={folder} must " in (said := capsys.readouterr().err)
  assert what in said
