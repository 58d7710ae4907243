"""Data sets by name: arrays on the host, or streams of them."""

from resnet_flax.datasets.loading import DATASETS, load
from resnet_flax.datasets.record import ArraySplit, Dataset, Draw, Split

__all__ = ["DATASETS", "ArraySplit", "Dataset", "Draw", "Split", "load"]
