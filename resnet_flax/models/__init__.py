"""Networks by name: the registry, its depth rules and `create_model`."""

from resnet_flax.models.registry import (
  MODELS,
  check_depth,
  create_model,
  num_filters,
  shortcut,
)

__all__ = [
  "MODELS",
  "check_depth",
  "create_model",
  "num_filters",
  "shortcut",
]
