"""Draws the test accuracy of seeds, their mean and their ensemble.

python -m experiments.seeds.plot
"""

import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.tools import records as records_lib

_FOLDER = pathlib.Path(__file__).parent
_MARKERS = "osDv^<>"


def main() -> None:
  """Writes the figure beside the raw figures."""
  records = records_lib.read(_FOLDER / "accuracy.jsonl")
  epochs = np.array([record["epoch"] + 1 for record in records])
  mean, std, ensemble = (
    np.array([100 * record[f"test_{name}"] for record in records])
    for name in ("accuracy", "accuracy_std", "ensemble_accuracy")
  )
  figure = Figure(figsize=(5, 3.6), layout="constrained")
  axis = figure.subplots()
  seeds = [of_seed["seed"] for of_seed in records[0]["seeds"]]
  for place, (seed, marker) in enumerate(zip(seeds, _MARKERS, strict=False)):
    values = [100 * r["seeds"][place]["test_accuracy"] for r in records]
    axis.plot(
      epochs,
      values,
      marker,
      color="0.35",
      label=f"seed {seed}",
      fillstyle="none",
    )
  axis.plot(epochs, mean, "--", color="#0072b2", label="their mean")
  axis.fill_between(
    epochs,
    mean - std,
    mean + std,
    color="#0072b2",
    alpha=0.15,
    label="± one standard deviation",
  )
  axis.plot(epochs, ensemble, "-", color="#d55e00", label="their ensemble")
  axis.set_xlabel("epochs")
  axis.set_ylabel("test accuracy, %")
  axis.xaxis.set_major_locator(MaxNLocator(integer=True))
  axis.grid(alpha=0.3)
  axis.legend(loc="lower right")
  figure.savefig(_FOLDER / "accuracy.png", dpi=110)


if __name__ == "__main__":
  main()
