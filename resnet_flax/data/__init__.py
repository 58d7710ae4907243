"""Data sets by name: arrays on the host, or streams of them."""

from resnet_flax.data.dataset import info, load, num_train_examples
from resnet_flax.data.types import ArraySplit, Dataset, Draw, Split

__all__ = [
  "ArraySplit",
  "Dataset",
  "Draw",
  "Split",
  "info",
  "load",
  "num_train_examples",
]
