"""Data sets by name: arrays on the host, or streams of them."""

from resnet_flax.data.dataset import ArraySplit, Dataset, Draw, Split
from resnet_flax.data.loading import DATASETS, info, load, num_train_examples

__all__ = [
  "DATASETS",
  "ArraySplit",
  "Dataset",
  "Draw",
  "Split",
  "info",
  "load",
  "num_train_examples",
]
