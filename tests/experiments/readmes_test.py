"""Every table of an experiment's README equals its raw files."""

import json
import re

import pytest

from experiments.depth_ablation import report as degradation
from experiments.depth_cost import measurement as depth_cost
from experiments.devices import measurement as devices
from experiments.faults import case
from experiments.seeds import measurement as seeds
from experiments.streaming import measurement as streaming
from experiments.throughput import report
from experiments.tools import markdown
from resnet_flax.run import metrics
from tests.helpers import ROOT

FOLDER = ROOT / "experiments"
# Of words, or of what `--dry_run` estimates.
NOT_MEASURED = ("| program | what it is |", "| sweep | what it is for |")


def read(name):
  return json.loads((FOLDER / name).read_text())


def records(name):
  return [json.loads(x) for x in (FOLDER / name).read_text().splitlines()]


def depth_ablation():
  cells = read("depth_ablation/degradation.json")
  yield from degradation.table(cells).splitlines()


def depth_costs():
  for name in ("results", "depth326", "depth1001"):
    yield from map(depth_cost.row, read(f"depth_cost/{name}.json")["results"])


def fault_table():
  rows = {}
  # The later files have those that were injected again.
  for name in ("kills", "named", "unknown_monitor", "mirror"):
    for each in read(f"faults/{name}.json")["table"]:
      title = each["fault"][0].upper() + each["fault"][1:]
      rows[title] = str(case.Row(**each | {"fault": title}))
  return rows.values()


def reproduction():
  for name in ("v1_depth20", "v2_depth29", "quickstart"):
    *_, last = found = records(f"reproduction/{name}.jsonl")
    speeds = [round(each["images_per_second"]) for each in found]
    spread = dict.fromkeys(map(str, (min(speeds), max(speeds))))
    cells = [
      f"`{name}`",
      str(len(found)),
      f"{last['train_accuracy']:.4f}",
      f"{last['test_loss']:.4f}",
      f"{last['test_accuracy']:.4f}",
      "–".join(spread),
      f"[jsonl]({name}.jsonl), [log]({name}.log)",
    ]
    yield f"| {' | '.join(cells)} |"


def seed_tables():
  yield from seeds.table(read("seeds/results.json")).splitlines()
  for epoch, record in enumerate(records("seeds/accuracy.jsonl"), 1):
    each = [r["test_accuracy"] for r in metrics.of_seeds(record)]
    cells = [
      str(epoch),
      ", ".join(f"{value:.4f}" for value in each),
      markdown.mean_and_std(each, ".4f"),
      f"{record['test_ensemble_accuracy']:.4f}",
    ]
    yield f"| {' | '.join(cells)} |"


def stream_tables():
  found = read("streaming/results.json")
  return streaming.table(found["rounds"], found["memory_mib"]).splitlines()


def throughput():
  for name in ("start", "start_depth56"):
    start = report.start_table(read(f"throughput/{name}.json")["start"])
    yield from start.splitlines()
  compared = report.tables(read("throughput/comparison/results.json"))
  for table in compared.values():
    yield from table.splitlines()


TABLES = {
  "depth_ablation": depth_ablation,
  "depth_cost": depth_costs,
  "devices": lambda: devices.table(
    read("devices/results.json")["measured"]
  ).splitlines(),
  "faults": fault_table,
  "reproduction": reproduction,
  "seeds": seed_tables,
  "streaming": stream_tables,
  "throughput": throughput,
}
# Their own tests look at these.
ELSEWHERE = {
  *("gradient_flow", "loss_surface", "option_cost", "parity", "recipes"),
  "weights",
}


def measured_rows(text):
  """The rows of all tables but those that measure nothing, without titles."""
  for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
    title, _, *rows = table.splitlines()
    if not title.startswith(NOT_MEASURED):
      yield from rows


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_that_of_the_raw_files(name):
  text = (FOLDER / name / "README.md").read_text().replace("**", "")
  shown = {row for row in measured_rows(text) if not row.startswith("| ---")}
  made = {row for row in TABLES[name]() if row.startswith("|")}
  assert shown
  assert shown <= made
  # Nor is one left out.
  assert made <= set(text.splitlines())


def test_every_experiment_is_looked_at():
  folders = {path.parent.name for path in FOLDER.glob("*/README.md")}
  assert folders == TABLES.keys() | ELSEWHERE
