"""Plain and residual networks of 20 and 56 layers, in little time.

He et al. 2015, figures 1 and 6: the deeper plain network trains worse than the
shallower one, the deeper residual network does not. Here with 10,000 of the
50,000 training images and six epochs, the last two at a tenth of the rate.

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
# Two cells at once on 2 cores are together faster than one after the other.
CPUS_PER_CELL = 1
