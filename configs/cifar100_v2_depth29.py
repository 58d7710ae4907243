"""ResNet-29 v2 on CIFAR-100 (fine labels).

Source: the Keras CIFAR-10 ResNet example, applied to CIFAR-100.
Expected: no result of this recipe on CIFAR-100 is published.
Cost: the same as v2_depth29.
Command: python -m resnet_flax.main --config=configs/cifar100_v2_depth29.py
"""

from resnet_flax.configs import v2_depth29


def get_config():
  """v2_depth29 with 100 classes."""
  config = v2_depth29.get_config()
  config.dataset.name = "cifar100"
  return config
