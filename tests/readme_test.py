import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from experiments.depth_ablation import report
from experiments.tools import markdown
from resnet_flax.tools.report import intervals

ROOT = pathlib.Path(__file__).parent.parent
READMES = sorted(
  path
  for pattern in ("*.md", "docs/*.md", "experiments/**/*.md")
  for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize(
  "path", READMES, ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_lead_somewhere(path):
  for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
    if not target.startswith("http"):
      assert (path.parent / target).exists(), target


@pytest.mark.parametrize(
  "path", READMES, ids=lambda p: str(p.relative_to(ROOT))
)
def test_anchors_are_headings(path):
  links = re.findall(r"\]\(([^)#]*)#([^)]+)\)", path.read_text())
  for target, anchor in links:
    if not target.startswith("http"):
      page = path.parent / target if target else path
      headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
      words = [re.sub(r"[^\w -]", "", each).lower() for each in headings]
      assert anchor in [each.replace(" ", "-") for each in words], target


def test_the_map_has_every_entry():
  text = (ROOT / "README.md").read_text().partition("```\nresnet_flax/\n")[2]
  block = text.partition("```")[0]
  rows = re.findall(r"^[├└]── ([\w./]+(?:, [\w./]+)*)", block, re.M)
  shown = {name.strip("/") for row in rows for name in row.split(", ")}
  entries = {path.name for path in (ROOT / "resnet_flax").iterdir()}
  assert shown == entries - {"__pycache__", "py.typed"}


def last_record(path):
  return json.loads(path.read_text().splitlines()[-1])


@pytest.mark.parametrize("name", ["plain", "resnet_v1"])
def test_the_degradation_is_that_of_the_runs(name):
  text = " ".join((ROOT / "README.md").read_text().split())
  folder = ROOT / "experiments" / "depth_ablation"
  cells = json.loads((folder / "degradation.json").read_text())
  ends = [
    [
      cell["train_error"]
      for cell in report.cells_of(cells, name, depth).values()
    ]
    for depth in report.DEPTHS
  ]
  shallow, deep = (markdown.mean_and_std(each, ".1f") for each in ends)
  assert f"{shallow} % with 20 layers and {deep} % with 56" in text
  assert f"(n = {len(ends[0])})" in text
  if name == "resnet_v1":
    assert not any(ends[0] + ends[1])
    assert f"| 0.0 points in every seed | {len(ends[0])} seeds |" in text


@pytest.mark.parametrize(
  "page", ["README.md", "docs/results.md", "experiments/README.md"]
)
def test_the_longer_run_is_that_of_the_raw_file(page):
  path = ROOT / "experiments" / "depth_ablation" / "degradation.json"
  cells = json.loads(path.read_text())
  (cell,) = filter(report.is_longer, cells)
  text = " ".join((ROOT / page).read_text().split())
  assert f"still has {cell['train_error']:.1f} %" in text
  own = " ".join(path.with_name("README.md").read_text().split())
  before = report.cells_of(cells, "plain", 56)[cell["seed"]]["train_error"]
  assert f"error of {cell['train_error']:.1f} %, against {before:.1f} %" in own


@pytest.mark.parametrize(
  "page", ["README.md", "docs/results.md", "experiments/README.md"]
)
def test_the_interval_of_the_degradation_is_that_of_the_runs(page):
  folder = ROOT / "experiments" / "depth_ablation"
  table = report.table(json.loads((folder / "degradation.json").read_text()))
  plain = re.search(
    r"`plain` \| ([\d.]+) ± .* \| \+([\d.]+) to \+([\d.]+) \| 5 \| degradation",
    table,
  )
  text = " ".join((ROOT / page).read_text().split())
  difference, low, high = plain.groups()
  assert f"(95 % interval {low} to {high})" in text
  if page == "README.md":
    row = f"| {difference} points more (95 % interval {low} to {high}) |"
    assert f"{row} 5 seeds |" in text
  assert re.search(rf"\b{difference} (± \S+ )?points", text)


def test_the_results_in_the_readme_are_those_of_the_raw_files():
  text = (ROOT / "README.md").read_text()
  folder = ROOT / "experiments"
  record = last_record(folder / "reproduction" / "quickstart.jsonl")
  assert f"| {record['test_accuracy']:.3f} test accuracy" in text
  assert f"{record['epoch'] + 1} epochs" in text
  runs = json.loads((folder / "recipes" / "results.json").read_text())
  ends, keras = (
    [
      run["accuracies"][-1]
      for run in runs
      if (run["recipe"], len(run["accuracies"])) == group
    ]
    for group in (("fast_cifar10", 10), ("v1_depth20", 8))
  )
  low, high, _ = intervals.interval(
    np.array(ends), np.array(keras), paired=False
  )
  difference = np.mean(ends) - np.mean(keras)
  assert (
    f"| {markdown.mean_and_std(ends, '.1f')} % test accuracy (mean ± standard"
    f" deviation), {difference:.1f} points above 8 epochs of the Keras recipe"
    f" (95 % interval {low:.1f} to {high:.1f}) | {len(ends)} seeds |"
  ) in text
  kills = json.loads((folder / "faults" / "kills.json").read_text())
  assert f"| {kills['kills']} signals |" in text


def test_commands_name_configs_that_exist():
  text = "\n".join(path.read_text() for path in READMES)
  names = set(re.findall(r"--config=(\S+\.py)", text))
  assert "configs/quickstart.py" in names
  for name in names:
    assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
  pytest.importorskip("material")
  built = subprocess.run(
    [
      *(sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"),
      *("--config-file", ".mkdocs.yml", "--site-dir", str(tmp_path / "site")),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert built.returncode == 0, built.stderr
  front = (tmp_path / "site" / "index.html").read_text()
  assert "Install and first run" in front
  assert 'href="CONTRIBUTING/"' in front
  text = (tmp_path / "site" / "results" / "index.html").read_text()
  pictures = re.findall(r'<img [^>]*src="([^"]+)"', text)
  assert pictures
  for picture in pictures:
    assert (tmp_path / "site" / "results" / picture).is_file(), picture


@pytest.mark.slow
def test_the_notebooks_run(tmp_path):
  pytest.importorskip("matplotlib")
  cells = []
  for name in ("first_training", "look_at_mistakes"):
    path = ROOT / "docs" / "notebooks" / f"{name}.ipynb"
    for cell in json.loads(path.read_text())["cells"]:
      if cell["cell_type"] == "code":
        assert not cell["outputs"]
        cells.append("".join(cell["source"]))
  # Enough for the accuracy below.
  code = "\n".join(cells)
  assert code.count("num_epochs = 5") == 2
  code = code.replace("num_epochs = 5", "num_epochs = 3")
  # Jupyter starts in the notebook's folder, where only the package is found.
  (tmp_path / "resnet_flax").symlink_to(ROOT / "resnet_flax")
  environment = os.environ | {"PYTHONPATH": str(tmp_path), "MPLBACKEND": "agg"}
  # It warns of oneDNN's programs, which it cannot keep.
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  ran = subprocess.run(
    [sys.executable, "-W", "error", "-c", code],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stderr
  assert float(ran.stdout.split()[0]) > 0.7
