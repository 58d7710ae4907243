"""The fast recipe in 30 epochs, about 40 minutes on 2 CPU cores.

python -m experiments.sweep --sweep=experiments/recipes/fast_longer.py
  --workdir=runs/recipes
"""

CONFIG = "configs/fast_cifar10.py"
OVERRIDES = {"num_epochs": 30}
GRID = {"seed": [0, 1, 2]}
