"""The Keras example's table at full scale, with five seeds of each network.

The sweep uses the example's recipe: 200 epochs of all 50,000 training images.

  python -m experiments.sweep --sweep=experiments/depth_ablation/keras.py
    --workdir=runs/keras
"""

CONFIG = "configs/v1_depth20.py"
OVERRIDES = {"num_seeds": 5}
GRID = [
  {"model.depth": [20, 32, 44, 56, 110]},
  {"model.depth": [56, 110], "model.name": ["resnet_v2"]},
]
