"""Plain and residual networks of 20 and 56 layers, trained for 32 epochs.

This repeats figures 1 and 6 of He et al. 2015 on 10,000 of the 50,000 training
images, without augmentation, for 32 epochs of 312 steps. The recipe's four
drops come at the same fractions of the training. README.md defines degradation.

  python -m experiments.sweep --sweep=experiments/depth_ablation/degradation.py
    --workdir=runs/degradation
"""

from typing import Any

CONFIG = "configs/v1_depth20.py"
OVERRIDES = {
  "num_epochs": 32,
  "dataset.train_examples": 10_000,
  "augment.name": "none",
}
# The seed varies slowest, so that an unfinished sweep has whole pairs.
GRID: dict[str, list[Any]] = {
  "seed": [0, 1, 2, 3, 4],
  "model.depth": [56, 20],
  "model.name": ["plain", "resnet_v1"],
}
# On 2 cores, two cells at once take less time than one after the other.
CPUS_PER_CELL = 1
