"""Keeps the records of finished trainings; draws and compares them.

python -m experiments.parity.report --workdir=runs/parity
"""

import json
import operator
import pathlib
import statistics

import numpy as np
from matplotlib.figure import Figure

from configs import v1_depth20
from experiments.tools import markdown, runs as runs_lib
from resnet_flax.run import errors, folder
from resnet_flax.tools.report import intervals

_FOLDER = pathlib.Path(__file__).parent
COMMAND = "python -m experiments.parity.report"
# The kept keys of a record; both programs write them.
_KEPT = (
  *("learning_rate", "train_accuracy", "train_objective"),
  *("test_accuracy", "test_objective", "epoch_seconds"),
)
_STYLES = {"Keras": ("#d55e00", "--"), "resnet_flax": ("#0072b2", "-")}


def collect(workdir: pathlib.Path) -> list[runs_lib.Run]:
  """Collects each finished training.

  Each has its `program`, 'Keras' or 'resnet_flax', its `seed`, the `records` of
  all epochs, and its `environment`. Raises `WorkdirError` if one of ours has
  another configuration than v1_depth20.
  """
  trainings = []
  for run, config, records in runs_lib.finished(workdir):
    usual = v1_depth20.get_config()
    usual.update({"seed": config.seed, "num_epochs": config.num_epochs})
    folder.check_same(run, usual)
    environment = folder.read_environment(run)
    trainings.append(("resnet_flax", config.seed, records, environment))
  for path in workdir.glob("keras-seed*.jsonl"):  # Unfinished ones are .part.
    records = [json.loads(line) for line in path.read_text().splitlines()]
    seed = int(path.stem.removeprefix("keras-seed"))
    if not (described := path.with_suffix(".environment.json")).exists():
      text = f"{described} is missing; remove {path} and train that seed again"
      raise errors.DataError(f"{text}.")
    recorded = json.loads(described.read_text())
    trainings.append(("Keras", seed, records, recorded))
  return [
    {
      "program": program,
      "seed": seed,
      "records": [{k: r[k] for k in _KEPT} for r in records],
      "environment": environment,
    }
    for program, seed, records, environment in trainings
  ]


def _records_of(
  runs: list[runs_lib.Run], program: str
) -> list[list[dict[str, float]]]:
  return [run["records"] for run in runs if run["program"] == program]


def _scores(run: list[dict[str, float]]) -> dict[str, float]:
  accuracies = [100 * record["test_accuracy"] for record in run]
  return {
    "last epoch's test accuracy, %": accuracies[-1],
    "best epoch's test accuracy, %": max(accuracies),
    "last epoch's training objective": run[-1]["train_objective"],
  }


def table(runs: list[runs_lib.Run]) -> str:
  """Final and best test accuracy and the objective, as Markdown."""
  if len({len(run["records"]) for run in runs}) > 1:
    raise ValueError("trainings of unequal length cannot be compared")
  sides = [[*map(_scores, _records_of(runs, name))] for name in _STYLES]
  cells = []
  for title in (sides[0] or sides[1])[0]:
    theirs, ours = ([run[title] for run in side] for side in sides)
    interval = intervals.interval(
      np.array(ours), np.array(theirs), paired=False
    )
    difference = "–"
    if theirs and ours:
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


def draw(runs: list[runs_lib.Run]) -> Figure:
  """Training objective and test error of all seeds, over the epochs."""
  figure = Figure(figsize=(9, 3.8), layout="constrained")
  axes = figure.subplots(1, 2)
  panels = {
    "training objective (nats, with L2)": lambda r: r["train_objective"],
    "test error (%)": lambda r: 100 * (1 - r["test_accuracy"]),
  }
  for axis, (title, value) in zip(axes, panels.items(), strict=True):
    for name, (color, line) in _STYLES.items():
      trainings = _records_of(runs, name)
      for k, run in enumerate(trainings):
        axis.plot(
          range(1, len(run) + 1),
          [value(record) for record in run],
          color=color,
          linestyle=line,
          linewidth=1.3,
          label=None if k else f"{name}, n = {len(trainings)}",
        )
    axis.set(xlabel="epoch", ylabel=title)
    axis.grid(alpha=0.3)
  axes[1].legend()
  figure.suptitle(
    "The Keras example and v1_depth20 on CIFAR-10 (JPEG copy), 50,000 images"
  )
  return figure


def main() -> None:
  """Adds to results.json; makes curves.png and the README's table."""
  runs_lib.report(
    *(COMMAND, "parity", _FOLDER / "results.json", "curves.png"),
    *(collect, operator.itemgetter("program", "seed"), draw, table),
  )


if __name__ == "__main__":
  main()
