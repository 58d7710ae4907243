"""The Keras example's recipe in 20 epochs, about 40 minutes on 2 CPU cores.

python -m experiments.sweep --sweep=experiments/recipes/keras_longer.py
  --workdir=runs/recipes
"""

CONFIG = "configs/v1_depth20.py"
OVERRIDES = {"num_epochs": 20}
GRID = {"seed": [0, 1, 2]}
