import json
import pathlib
import re
import statistics

import pytest

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


def last_record(path):
  return json.loads(path.read_text().splitlines()[-1])


@pytest.mark.parametrize(
  ("page", "name"),
  [
    ("README.md", "plain"),
    ("README.md", "resnet_v1"),
    ("docs/results.md", "resnet_v1"),
  ],
)
@pytest.mark.parametrize("depth", [20, 56])
def test_the_degradation_is_that_of_the_runs(page, name, depth):
  text = " ".join((ROOT / page).read_text().split())
  runs = ROOT / "experiments" / "depth_ablation" / "runs"
  records = [
    last_record(runs / f"{name}-{depth}-seed{seed}" / "metrics.jsonl")
    for seed in (0, 1)
  ]
  found = [100 * (1 - record["train_accuracy"]) for record in records]
  mean, std = statistics.mean(found), statistics.stdev(found)
  assert f"{mean:.1f} ± {std:.1f} %" in text


def test_the_results_in_the_readme_are_those_of_the_raw_files():
  text = (ROOT / "README.md").read_text()
  folder = ROOT / "experiments"
  record = last_record(folder / "reproduction" / "quickstart.jsonl")
  assert f"| {record['test_accuracy']:.3f} test accuracy" in text
  assert f"{record['epoch'] + 1} epochs" in text
  kills = json.loads((folder / "faults" / "kills.json").read_text())
  assert f"{kills['kills']} kills" in text


def test_commands_name_configs_that_exist():
  text = "\n".join(path.read_text() for path in READMES)
  names = set(re.findall(r"--config=(\S+\.py)", text))
  assert "configs/quickstart.py" in names
  for name in names:
    assert (ROOT / name).exists(), name
