"""Draws the accuracy of both runs against epochs, and prints a table.

python -m experiments.cpu_training.plot
"""

import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_FOLDER = pathlib.Path(__file__).parent
# Readable in black and white: markers and lines differ, not only colours.
_STYLES = {
  "resnet_flax": {"color": "#0072b2", "marker": "o", "linestyle": "-"},
  "plain_flax": {"color": "#d55e00", "marker": "s", "linestyle": "--"},
}


def records(name: str) -> list[dict[str, float]]:
  """One record an epoch, as the run's metrics.jsonl has them.

  Args:
    name: of the run.
  """
  lines = (_FOLDER / f"{name}.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def main() -> None:
  """Writes curves.png beside the logs."""
  figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
  for name, style in _STYLES.items():
    run = records(name)
    epochs = [record["epoch"] + 1 for record in run]
    for axis, split in zip(axes, ("train", "test"), strict=True):
      accuracies = [record[f"{split}_accuracy"] for record in run]
      axis.plot(epochs, accuracies, label=name, **style)
    print(f"{name}:\n")
    print("| epoch | train loss | train acc. | test acc. | s | images/s |")
    print("|" + " --- |" * 6)
    for record in run:
      print(
        f"| {record['epoch'] + 1} | {record['train_loss']:.4f}"
        f" | {record['train_accuracy']:.4f} | {record['test_accuracy']:.4f}"
        f" | {record['epoch_seconds']:.0f}"
        f" | {record['images_per_second']:.0f} |"
      )
  for axis, split in zip(axes, ("training", "test"), strict=True):
    axis.set_xlabel("epoch")
    axis.set_ylabel(f"{split} accuracy (fraction)")
    axis.grid(alpha=0.3)
  axes[0].legend()
  figure.suptitle("ResNet-20 v1, CIFAR-10 (JPEG copy), 50,000 images, seed 0")
  figure.savefig(_FOLDER / "curves.png", dpi=150)


if __name__ == "__main__":
  main()
