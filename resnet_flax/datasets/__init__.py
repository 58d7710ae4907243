"""Data sets by name: arrays on the host, or streams of them."""

from resnet_flax.datasets.loading import DATASETS, load
from resnet_flax.datasets.record import Dataset, Draw, Split

__all__ = ["DATASETS", "Dataset", "Draw", "Split", "load"]
