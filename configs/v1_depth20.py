"""ResNet-20 v1 on CIFAR-10: the Keras example's own setting.

Source: the Keras CIFAR-10 ResNet example; He et al. 2015, section 4.2.
Expected: 92.16 % test accuracy after 200 epochs, as published by the example.
Cost: 10 million images: about 7 hours on 2 cores of an AMD EPYC, as 8
  epochs take 16 minutes (experiments/recipes).
Command: python -m resnet_flax.main --config=configs/v1_depth20.py
Other depths of v1 (6n+2): --config.model.depth=32 (44, 56, 110)
"""

from resnet_flax.configs import base


def get_config():
  """The base configuration, unchanged."""
  return base.get_config()
