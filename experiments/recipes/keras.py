"""The Keras example's recipe in eight epochs, about 15 minutes on 2 CPU cores.

python -m experiments.sweep --sweep=experiments/recipes/keras.py
  --workdir=runs/recipes
"""

CONFIG = "configs/v1_depth20.py"
OVERRIDES = {"num_epochs": 8}
GRID = {"seed": [0, 1, 2]}
