"""Plain and residual networks of 20 and 56 layers, trained until they stop.

He et al. 2015, figures 1 and 6, on 10,000 of the 50,000 training images,
without augmentation: 32 epochs of 312 steps, with the recipe's four drops at
the same parts of the training. README.md states what is called degradation.

  python -m experiments.sweep --sweep=experiments/depth_ablation/degradation.py
    --workdir=runs/degradation
"""

CONFIG = "configs/v1_depth20.py"
OVERRIDES = {
  "num_epochs": 32,
  "dataset.train_examples": 10_000,
  "augment.name": "none",
}
# Seed by seed: an unfinished sweep has whole pairs.
GRID = {
  "seed": [0, 1, 2, 3, 4],
  "model.depth": [56, 20],
  "model.name": ["plain", "resnet_v1"],
}
# Two cells at once on 2 cores are together faster than one after the other.
CPUS_PER_CELL = 1
