"""Collects the finished runs of this folder's sweeps; draws and tabulates them.

python -m experiments.recipes.report --workdir=runs/recipes
"""

import importlib
import json
import pathlib
import statistics
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments.tools import markdown, runs as runs_lib
from resnet_flax.run import config as config_lib, errors, folder, keys, load

_FOLDER = pathlib.Path(__file__).parent
COMMAND = "python -m experiments.recipes.report"
Run = runs_lib.Run
# Runs of one recipe may differ in these keys.
_SHARED = ("seed", "num_epochs", *config_lib.MAY_DIFFER)


def collect(workdir: pathlib.Path) -> list[Run]:
  """Collects the accuracies and times of each finished run.

  `accuracies` are the epochs' test accuracies in percent. `minutes` is the time
  of training and scoring up to the end of each epoch. `unflipped` is the last
  epoch's test accuracy without mirror images. `recipe` names the configuration,
  from the start of the folder's name, and the keys that the run changes.
  """
  runs = []
  for run, config, records in runs_lib.finished(workdir):
    name = run.name.partition(",")[0]
    try:
      usual = importlib.import_module(f"configs.{name}").get_config()
    except ModuleNotFoundError:
      raise errors.WorkdirError(
        f"{run} is not named after a file of configs/."
      ) from None
    # Through JSON, which turns tuples into lists.
    usual = json.loads(json.dumps(keys.to_flat(usual)))
    own = {
      key: value
      for key, value in keys.to_flat(config).items()
      if value != usual.get(key) and key not in _SHARED
    }
    seconds = [r["epoch_seconds"] + r["evaluation_seconds"] for r in records]
    one_view = ConfigDict(config.to_dict())
    one_view.dataset.test_crops = 1
    unflipped = load.evaluate_workdir(run, "latest", config=one_view)
    runs.append(
      {
        "recipe": folder.default_name(name, own),
        "seed": config.seed,
        "accuracies": [round(100 * r["test_accuracy"], 2) for r in records],
        "minutes": np.round(np.cumsum(seconds) / 60, 2).tolist(),
        "images_per_second": statistics.median(
          r["images_per_second"] for r in records
        ),
        "unflipped": round(100 * unflipped["accuracy"], 2),
        "environment": folder.read_environment(run),
      }
    )
  return runs


def _key(run: Run) -> tuple[str, int, int]:
  return run["recipe"], len(run["accuracies"]), run["seed"]


def by_recipe(runs: list[Run]) -> Iterator[tuple[str, list[Run]]]:
  """The runs of each recipe and number of epochs."""
  groups: dict[tuple[str, int], list[Run]] = {}
  for run in runs:
    groups.setdefault(_key(run)[:2], []).append(run)
  for (recipe, _), group in groups.items():
    yield recipe, group


def _processor(run: Run) -> str:
  return run["environment"]["cpu_model"].replace("(R)", "")


def table(runs: list[Run]) -> str:
  """The last epoch's accuracies; speed, minutes and processor are seed 0's."""
  rows = []
  for recipe, group in by_recipe(runs):
    speed, minutes = group[0]["images_per_second"], group[0]["minutes"][-1]
    is_timed = group[0]["seed"] == 0
    rows.append(
      [
        f"`{recipe}`",
        len(group[0]["accuracies"]),
        markdown.mean_and_std([run["accuracies"][-1] for run in group], ".2f"),
        markdown.mean_and_std([run["unflipped"] for run in group], ".2f"),
        len(group),
        *([f"{speed:.0f}", f"{minutes:.1f}"] if is_timed else ["–", "–"]),
        _processor(group[0]),
      ]
    )
  titles = (
    *("recipe", "epochs", "test accuracy %", "without mirror images", "n"),
    *("images/s", "minutes", "processor"),
  )
  return markdown.table(titles, rows)


def draw(runs: list[Run]) -> Figure:
  """Test accuracy of every seed against the minutes of seed 0's training."""
  figure = Figure(figsize=(7.2, 4.2), layout="constrained")
  axis = figure.subplots()
  for k, (recipe, group) in enumerate(by_recipe(runs)):
    for run in group:
      label = f"{recipe}, {len(run['accuracies'])} epochs, n = {len(group)},"
      label += f" {_processor(run)}"
      axis.plot(
        group[0]["minutes"],  # Other seeds shared the machine.
        run["accuracies"],
        color=f"C{k}",
        marker=".",
        label=label if run is group[0] else None,
      )
  axis.set(
    xlabel="minutes of seed 0's training and scoring",
    ylabel="test accuracy (%)",
  )
  axis.grid(alpha=0.3)
  axis.legend()
  figure.suptitle("CIFAR-10 (JPEG copy), 2 CPU cores", fontsize="medium")
  return figure


def main() -> None:
  """Adds to results.json; makes accuracy.png and the README's table."""
  runs_lib.report(
    *(COMMAND, "recipes", _FOLDER / "results.json", "accuracy.png"),
    *(collect, _key, draw, table),
  )


if __name__ == "__main__":
  main()
