"""ResNet-29 v2 on CIFAR-10: bottleneck blocks with pre-activation.

Source: the Keras CIFAR-10 ResNet example; after He et al. 2016, whose
  bottlenecks are narrower (docs/networks.md).
Expected: the example publishes no figure for depth 29 (56: 93.01 %,
  110: 93.15 % test accuracy after 200 epochs).
Cost: 2.4 times the multiply-adds of v1_depth20 for each image.
Command: python -m resnet_flax.main --config=configs/v2_depth29.py
Other depths of v2 (9n+2): --config.model.depth=56 (110, 164)
"""

from resnet_flax.configs import base


def get_config():
  """The Keras recipe with the v2 network."""
  config = base.get_config()
  config.model.name = "resnet_v2"
  config.model.depth = 29
  return config
