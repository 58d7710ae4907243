"""Draws the first epochs of the families of networks.

python -m experiments.families.plot
"""

import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

_FOLDER = pathlib.Path(__file__).parent
# Readable in black and white: markers and dashes differ, not only colours.
_RUNS = {
  "resnet_v1_A": ("resnet_v1, A", "#56b4e9", "s", "-"),
  "resnet_v1_B": ("resnet_v1, B", "#009e73", "^", "-"),
  "preact": ("preact, A", "#cc79a7", "D", "--"),
  "highway": ("highway, A", "#e69f00", "v", "-."),
  "plain": ("plain", "#000000", "x", ":"),
}
_PANELS = {
  "train_loss": "training cross-entropy (nats)",
  "test_accuracy": "test accuracy (fraction)",
}


def main() -> None:
  """Writes curves.png beside the records."""
  figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
  for name, (label, color, marker, line) in _RUNS.items():
    lines = (_FOLDER / f"{name}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for axis, key in zip(axes, _PANELS, strict=True):
      axis.plot(
        [record["epoch"] + 1 for record in records],
        [record[key] for record in records],
        color=color,
        marker=marker,
        linestyle=line,
        label=label,
      )
  for axis, title in zip(axes, _PANELS.values(), strict=True):
    axis.set_xlabel("epoch")
    axis.set_ylabel(title)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
  axes[1].legend(fontsize=8, loc="lower right")
  figure.suptitle(
    "Depth 20, first epochs: CIFAR-10 (JPEG copy), 50,000 images, seed 0"
  )
  figure.savefig(_FOLDER / "curves.png", dpi=150)


if __name__ == "__main__":
  main()
