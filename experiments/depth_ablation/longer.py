"""The plain network of 56 layers, trained for three times as many epochs.

He et al. 2015, section 4.1, footnote 3: with three times as many iterations the
degradation remained. README.md says what is compared.

  python -m experiments.sweep --sweep=experiments/depth_ablation/longer.py
    --workdir=runs/degradation
"""

from experiments.depth_ablation import degradation

CONFIG = degradation.CONFIG
OVERRIDES = {**degradation.OVERRIDES, "num_epochs": 96, "model.name": "plain"}
GRID = {"seed": [0], "model.depth": [56]}
CPUS_PER_CELL = 2
