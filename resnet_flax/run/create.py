"""Networks by name, for Python code that has no configuration."""

from typing import Any

import flax.linen as nn

from resnet_flax.models import registry
from resnet_flax.run import config as config_keys, errors, rules


def list_models() -> list[str]:
  """The names that `create_model` takes."""
  return list(registry.MODELS)


def create_model(
  name: str, depth: int, num_classes: int, **model_keys: Any
) -> nn.Module:
  """Builds an untrained network.

  Args:
    name: one of `list_models()`.
    depth: weighted layers except shortcuts; for wide_resnet all convolutions.
    num_classes: the size of the head.
    **model_keys: other keys `model.KEY` of docs/configuration.md, for example
      `num_filters=32`; the defaults are the Keras CIFAR-10 recipe's.

  Returns:
    A module: `model.init(key, images, train=False)` makes its variables, and
    `model.apply(variables, images, train=False)` maps normalised float[B, H, W,
    3] images to float32[B, num_classes] logits.

  Raises:
    ConfigError: an unknown name or key, or values that fit no network.
  """
  config = config_keys.default_config()
  with config.unlocked(), config.ignore_type():
    config.model.update(
      model_keys, name=name, depth=depth, num_classes=num_classes
    )
  rules.check_values(config)
  rules.check_model(config.model)
  if not num_classes:
    raise errors.ConfigError("num_classes=0 must be at least 1.")
  return registry.create_model(config.model, num_classes)
