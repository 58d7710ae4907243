"""Keeps the records of finished trainings; draws and compares them.

python -m experiments.parity.report --workdir=runs/parity
"""

import json
import pathlib
import statistics
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.tools import markdown, runs as runs_lib
from resnet_flax.tools.report import intervals

_FOLDER = pathlib.Path(__file__).parent
COMMAND = "python -m experiments.parity.report"
# What is kept of a record; both sides have it.
_KEPT = (
  *("learning_rate", "train_accuracy", "train_objective"),
  *("test_accuracy", "test_objective", "epoch_seconds"),
)
_STYLES = {"Keras": ("#d55e00", "--"), "resnet_flax": ("#0072b2", "-")}
Results = dict[str, Any]


def collect(workdir: pathlib.Path) -> Results:
  """The records of seeds that both sides have finished; {} if there are none.

  'Keras' and 'resnet_flax' have a list of seeds, each a list of its epochs'
  records. `environment` is the machine's.
  """
  found: Results = {"Keras": [], "resnet_flax": []}
  for theirs in sorted(workdir.glob("keras-seed*.jsonl")):
    seed = theirs.stem.removeprefix("keras-seed")
    ours = workdir / f"ours-seed{seed}" / "metrics.jsonl"
    sides = [
      [json.loads(line) for line in path.read_text().splitlines()]
      for path in (theirs, ours)
      if path.exists()
    ]
    if len({len(side) for side in sides}) == 1 and sides[1:]:
      for name, side in zip(_STYLES, sides, strict=True):
        found[name].append([{k: r[k] for k in _KEPT} for r in side])
  if not found["Keras"]:
    return {}
  environment = json.loads((workdir / "environment.json").read_text())
  return found | {"environment": environment}


def _scores(run: list[dict[str, float]]) -> dict[str, float]:
  accuracies = [100 * record["test_accuracy"] for record in run]
  seconds = [record["epoch_seconds"] for record in run]
  return {
    "last epoch's test accuracy, %": accuracies[-1],
    "best epoch's test accuracy, %": max(accuracies),
    "last epoch's training objective": run[-1]["train_objective"],
    "training of an epoch, s": statistics.median(seconds),
  }


def table(results: Results) -> str:
  """Final and best test accuracy, objective and time, as Markdown."""
  sides = [[_scores(run) for run in results[name]] for name in _STYLES]
  cells = []
  for title in sides[0][0]:
    theirs, ours = ([run[title] for run in side] for side in sides)
    interval = intervals.interval(
      np.array(ours), np.array(theirs), paired=False
    )
    difference = f"{statistics.mean(ours) - statistics.mean(theirs):+.3g}"
    if interval:
      difference += f" ({interval[0]:+.3g} to {interval[1]:+.3g})"
    means = [
      f"{markdown.mean_and_std(values, '.2f')} (n = {len(values)})"
      for values in (theirs, ours)
    ]
    cells.append([title, *means, difference])
  titles = "", "Keras", "resnet_flax", "difference, 95 % interval"
  return markdown.table(titles, cells)


def draw(results: Results) -> Figure:
  """Training objective and test error of all seeds, over the epochs."""
  figure = Figure(figsize=(9, 3.8), layout="constrained")
  axes = figure.subplots(1, 2)
  panels = {
    "training objective (nats, with L2)": lambda r: r["train_objective"],
    "test error (%)": lambda r: 100 * (1 - r["test_accuracy"]),
  }
  for axis, (title, value) in zip(axes, panels.items(), strict=True):
    for name, (color, line) in _STYLES.items():
      for seed, run in enumerate(results[name]):
        axis.plot(
          range(1, len(run) + 1),
          [value(record) for record in run],
          color=color,
          linestyle=line,
          linewidth=1.3,
          label=None if seed else f"{name}, {len(results[name])} seeds",
        )
    axis.set(xlabel="epoch", ylabel=title)
    axis.grid(alpha=0.3)
  axes[1].legend()
  figure.suptitle(
    "The Keras example and v1_depth20 on CIFAR-10 (JPEG copy), 50,000 images"
  )
  return figure


def main() -> None:
  """Writes results.json, curves.png and the README's table."""
  runs_lib.report(
    *(COMMAND, "parity", _FOLDER / "results.json", "curves.png"),
    *(collect, draw, table),
  )


if __name__ == "__main__":
  main()
