"""Data sets by name, as arrays on the host."""

from resnet_flax.datasets.loading import DATASETS, load
from resnet_flax.datasets.record import Dataset, Split

__all__ = ["DATASETS", "Dataset", "Split", "load"]
