"""Plain and residual networks of 20 and 56 layers, in little time.

He et al. 2015, figures 1 and 6: the deeper plain network trains worse than the
shallower one, the deeper residual network does not. Here with 8,000 of the
50,000 training images and three epochs, the last at a tenth of the rate: about
25 minutes on 2 CPU cores.

  python -m experiments.sweep --sweep=experiments/depth_ablation/sweep.py
    --workdir=runs/depth_ablation
"""

CONFIG = "configs/v1_depth20.py"
OVERRIDES = {
  "num_epochs": 3,
  "dataset.train_examples": 8_000,
  "schedule.drop_percents": (50,),
  "schedule.drop_factors": (0.1,),
}
GRID = {
  "model.name": ["plain", "resnet_v1"],
  "model.depth": [20, 56],
  "seed": [0, 1],
}
