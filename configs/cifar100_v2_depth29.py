"""ResNet-29 v2 on CIFAR-100 (fine labels).

Source: the Keras CIFAR-10 ResNet example, on the data set's sibling.
Expected: nothing is published for this recipe on CIFAR-100.
Cost: that of v2_depth29.
Command: python -m resnet_flax.main --config=configs/cifar100_v2_depth29.py
"""

from resnet_flax.configs import v2_depth29


def get_config():
  """v2_depth29 with 100 classes."""
  config = v2_depth29.get_config()
  config.dataset.name = "cifar100"
  return config
