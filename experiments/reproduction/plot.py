"""Draws the loss and accuracy curves of the first runs from their logs.

python -m experiments.reproduction.plot
"""

import math
import pathlib
import re

from matplotlib.figure import Figure

from experiments.tools import records as records_lib

_FOLDER = pathlib.Path(__file__).parent
# Readable in black and white: the styles differ, not only the colours.
_STYLES = {
  "v1_depth20": ({"color": "#0072b2", "marker": "o"}, "--"),
  "v2_depth29": ({"color": "#d55e00", "marker": "s"}, ":"),
}


def within_epochs(name: str) -> list[tuple[float, float, float]]:
  """Reads running training means: (epochs done, loss, accuracy)."""
  pattern = re.compile(
    r"epoch (?P<epoch>\d+)(?P<of>/| of )\d+ step (\d+)/(\d+):"
    r" loss ([\d.]+), accuracy ([\d.]+)"
  )
  points: list[tuple[float, float, float]] = []
  for line in (_FOLDER / f"{name}.log").read_text().splitlines():
    if match := pattern.match(line):
      # An older version wrote these logs and counted epochs from 1, as 1/10.
      epoch = int(match["epoch"]) - (match["of"] == "/")
      done = epoch + int(match[3]) / int(match[4])
      if points and int(points[-1][0]) < int(done):
        # Each epoch has its own mean, so no line connects two epochs.
        points.append((done, math.nan, math.nan))
      points.append((done, float(match[5]), float(match[6])))
  return points


def main() -> None:
  """Writes curves.png beside the logs."""
  figure = Figure(figsize=(9, 3.6), layout="constrained")
  axes = figure.subplots(1, 2)
  for name, (style, running_line) in _STYLES.items():
    records = records_lib.read(_FOLDER / f"{name}.jsonl")
    epochs = [record["epoch"] + 1 for record in records]
    running = within_epochs(name)
    for axis, column, key in (
      (axes[0], 1, "loss"),
      (axes[1], 2, "accuracy"),
    ):
      axis.plot(
        [point[0] for point in running],
        [point[column] for point in running],
        linestyle=running_line,
        linewidth=1.4,
        color=style["color"],
        label=f"{name}, training (mean of the epoch so far)",
      )
      axis.plot(
        epochs,
        [record[f"test_{key}"] for record in records],
        linewidth=2.2,
        label=f"{name}, test",
        **style,
      )
      axis.set_xlabel("epoch")
      axis.grid(alpha=0.3)
  axes[0].set_ylabel("cross-entropy (nats)")
  axes[1].set_ylabel("accuracy (fraction)")
  axes[1].legend(fontsize=7, loc="lower right")
  figure.suptitle("First light: CIFAR-10 (JPEG copy), 50,000 images, seed 0")
  figure.savefig(_FOLDER / "curves.png", dpi=150)


if __name__ == "__main__":
  main()
