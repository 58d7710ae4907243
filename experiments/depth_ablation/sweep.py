"""Plain and residual networks of 20 and 56 layers, trained briefly.

In figures 1 and 6 of He et al. 2015 depth raises the training error of plain
networks, not of residual networks. This sweep uses 10,000 of the 50,000
training images and six epochs, the last two at a tenth of the learning rate.

  python -m experiments.sweep --sweep=experiments/depth_ablation/sweep.py
    --workdir=runs/depth_ablation
"""

CONFIG = "configs/v1_depth20.py"
OVERRIDES = {
  "num_epochs": 6,
  "dataset.train_examples": 10_000,
  "schedule.drop_percents": (50,),
  "schedule.drop_factors": (0.1,),
}
GRID = {
  "seed": [0, 1],
  "model.depth": [56, 20],
  "model.name": ["plain", "resnet_v1"],
}
# On 2 cores, two cells at once take less time than one after the other.
CPUS_PER_CELL = 1
