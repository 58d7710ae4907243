"""Table 6 and figure 6 of He et al. 2015 at full scale, with five seeds.

The sweep trains plain and residual networks of 20 to 110 layers by the paper's
own recipe, for 164 epochs of all 50,000 training images.

  python -m experiments.sweep --sweep=experiments/depth_ablation/he2015.py
    --workdir=runs/he2015
"""

CONFIG = "configs/he2015_depth20.py"
OVERRIDES = {"num_seeds": 5}
depths = [20, 32, 44, 56, 110]
GRID = [
  {"model.depth": depths},
  {"model.depth": depths, "model.name": ["plain"], "model.shortcut": ["none"]},
]
