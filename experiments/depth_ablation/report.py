"""Scores the cells of degradation.py and longer.py; draws and judges them.

python -m experiments.depth_ablation.report --workdir=runs/degradation
"""

import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from configs import v1_depth20
from experiments.depth_ablation import degradation, longer
from experiments.tools import markdown, runs as runs_lib
from resnet_flax.run import folder, keys, load
from resnet_flax.tools.report import intervals

_FOLDER = pathlib.Path(__file__).parent
COMMAND = "python -m experiments.depth_ablation.report"
NETWORKS = ("plain", "resnet_v1")
DEPTHS = (20, 56)
SEEDS = range(5)
# Limits that README.md set before the first run, in points of training error.
_FLAT_EPOCHS = 8
_FLAT = 1.0
_NO_DEGRADATION = 1.0
_STYLES = {
  ("plain", 20): ("#000000", ":"),
  ("plain", 56): ("#d55e00", "--"),
  ("resnet_v1", 20): ("#009e73", "-."),
  ("resnet_v1", 56): ("#0072b2", "-"),
}
Cell = runs_lib.Run


def collect(workdir: pathlib.Path) -> list[Cell]:
  """Scores the final weights of each finished cell and collects its curves.

  `train_error` and `test_error` are of the final weights in inference mode,
  `train_errors` and `test_errors` of the epochs; all are in percent. An epoch's
  training error is a mean over its steps, during which the network changes.
  Raises `WorkdirError` if a run is not a cell of degradation.py or longer.py.
  """
  cells = []
  for run, config, records in runs_lib.finished(workdir):
    cell = v1_depth20.get_config()
    epochs = longer.OVERRIDES["num_epochs"]
    sweep = longer if config.num_epochs == epochs else degradation
    cell.update_from_flattened_dict(sweep.OVERRIDES)
    flat = keys.to_flat(config)
    cell.update_from_flattened_dict(
      {
        key: flat[key] if flat[key] in values else values[0]
        for key, values in sweep.GRID.items()
      }
    )
    folder.check_same(run, cell)
    scores = load.evaluate_workdir(run, "latest", split="train")
    curves = {
      f"{split}_errors": [
        round(100 * (1 - record[f"{split}_accuracy"]), 3) for record in records
      ]
      for split in ("train", "test")
    }
    cells.append(
      {
        "network": config.model.name,
        "depth": config.model.depth,
        "seed": config.seed,
        "train_error": 100 * (1 - scores["accuracy"]),
        "test_error": curves["test_errors"][-1],
        **curves,
        "minutes": sum(record["epoch_seconds"] for record in records) / 60,
        "environment": folder.read_environment(run),
      }
    )
  return cells


def cells_of(cells: list[Cell], network: str, depth: int) -> dict[int, Cell]:
  """The cells of degradation.py of a network and a depth, by their seeds."""
  return {
    cell["seed"]: cell
    for cell in cells
    if (cell["network"], cell["depth"]) == (network, depth)
    and not is_longer(cell)
  }


def is_longer(cell: Cell) -> bool:
  """Whether a cell is from longer.py."""
  return len(cell["train_errors"]) == longer.OVERRIDES["num_epochs"]


def table(cells: list[Cell]) -> str:
  """Markdown: errors, differences by depth with verdicts, the longer runs."""
  errors, by_depth = [], []
  for network in NETWORKS:
    shallow, deep = (cells_of(cells, network, depth) for depth in DEPTHS)
    for depth, by_seed in zip(DEPTHS, (shallow, deep), strict=True):
      means = [
        markdown.mean_and_std([cell[key] for cell in by_seed.values()], ".1f")
        for key in ("train_error", "test_error")
      ]
      errors.append([f"`{network}`", depth, *means, len(by_seed)])
    seeds = sorted(shallow.keys() & deep.keys())
    final_errors = [
      np.array([each[seed]["train_error"] for seed in seeds])
      for each in (deep, shallow)
    ]
    differences = final_errors[0] - final_errors[1]
    interval: tuple[float, ...] | None
    interval = intervals.interval(*final_errors, paired=True)
    limits = "{:+.1f} to {:+.1f}".format(*interval) if interval else "–"
    if interval is None and len(seeds) > 1:
      interval, limits = (differences[0],) * 2, "none: no spread"
    difference = markdown.mean_and_std(differences.tolist(), ".1f")
    judged = verdict(network, differences, interval, deep)
    by_depth.append([f"`{network}`", difference, limits, len(seeds), judged])
  error_titles = (
    *("network", "depth", "training error %, final weights", "test error %"),
    "n",
  )
  depth_titles = (
    *("network", "56 less 20 layers, points of training error"),
    *("95 % interval", "seeds", "shown"),
  )
  tables = [
    markdown.table(error_titles, errors),
    markdown.table(depth_titles, by_depth),
  ]
  shallow_errors = [
    cell["train_error"] for cell in cells_of(cells, "plain", 20).values()
  ]
  of_longer = [
    [
      *("`plain`", cell["depth"], len(cell["train_errors"]), cell["seed"]),
      *(f"{cell[key]:.1f}" for key in ("train_error", "test_error")),
      "degradation remains"
      if cell["train_error"] > max(shallow_errors)
      else "degradation does not remain",
    ]
    for cell in filter(is_longer, cells)
  ]
  if of_longer:
    longer_titles = ("network", "depth", "epochs", "seed", *error_titles[2:4])
    tables.append(markdown.table((*longer_titles, "shown"), of_longer))
  return "\n\n".join(tables)


def verdict(
  network: str,
  differences: np.ndarray,
  interval: tuple[float, ...] | None,
  deep: dict[int, Cell],
) -> str:
  """A network's verdict by the rules of README.md."""
  if len(differences) < len(SEEDS) or interval is None:
    return f"not yet: {len(differences)} of {len(SEEDS)} seeds"
  if network != "plain":
    return "no degradation" if interval[1] < _NO_DEGRADATION else "not shown"
  moves = [
    abs(cell["train_errors"][-1] - cell["train_errors"][-1 - _FLAT_EPOCHS])
    for cell in deep.values()
  ]
  degrades = min(differences) > 0 and interval[0] > 0 and max(moves) < _FLAT
  return "degradation" if degrades else "not shown"


def draw(cells: list[Cell]) -> Figure:
  """Training error (thick) and test error of all seeds over the epochs."""
  figure = Figure(figsize=(7.2, 4.6), layout="constrained")
  axis = figure.subplots()
  for (network, depth), (color, line) in _STYLES.items():
    by_seed = cells_of(cells, network, depth)
    for split, width, alpha in (("train", 2.2, 1.0), ("test", 0.9, 0.6)):
      for k, cell in enumerate(by_seed.values()):
        curve = cell[f"{split}_errors"]
        label = f"{network}, {depth} layers, n = {len(by_seed)}"
        axis.plot(
          range(1, len(curve) + 1),
          curve,
          color=color,
          linestyle=line,
          linewidth=width,
          alpha=alpha,
          label=label if split == "train" and not k else None,
        )
  num_epochs = degradation.OVERRIDES["num_epochs"]
  axis.set(xlabel="epochs of training", ylabel="error (%)", ylim=(0, None))
  axis.grid(alpha=0.3)
  axis.legend()
  figure.suptitle(
    "Training (thick) and test error of each seed: CIFAR-10 (JPEG copy),\n"
    f"10,000 training images, no augmentation, {num_epochs} epochs",
    fontsize="medium",
  )
  return figure


def _key(cell: Cell) -> tuple[Any, ...]:
  network = cell["network"], cell["depth"]
  return *network, len(cell["train_errors"]), cell["seed"]


def main() -> None:
  """Adds to degradation.json; makes degradation.png and the README's table."""
  runs_lib.report(
    *(COMMAND, "degradation", _FOLDER / "degradation.json", "degradation.png"),
    *(collect, _key, draw, table),
  )


if __name__ == "__main__":
  main()
