"""The fast recipe: ten epochs, about 15 minutes on 2 CPU cores.

python -m experiments.sweep --sweep=experiments/recipes/fast.py
  --workdir=runs/recipes
"""

CONFIG = "configs/fast_cifar10.py"
GRID = {"seed": [0, 1, 2]}
