"""Counts the arithmetic of the recipe's ResNet v1 on one image.

Each multiply-add of the convolutions and the dense layer counts as two
operations; products with padding count, too. Batch norm, ReLU and the optimizer
do not count, as is customary: they take time, but few operations.
"""

import functools
import math

from configs import v1_depth20
from resnet_flax.models import registry
from resnet_flax.run import experiment as experiment_lib
from resnet_flax.tools import summary


@functools.cache
def inference(depth: int) -> int:
  """Counts the floating-point operations of predicting one image."""
  config = v1_depth20.get_config()
  config.model.depth = depth
  experiment = experiment_lib.build(config)
  size = summary.measure_size(experiment.model, experiment.image_shape)
  return 2 * size.multiply_adds


def training(depth: int) -> int:
  """Counts the floating-point operations of training on one image.

  Each of a layer's two gradients takes as many operations as its output. The
  gradient of the images is not computed.
  """
  config = v1_depth20.get_config()
  image_shape = experiment_lib.build(config).image_shape
  num_filters = registry.num_filters(config.model)
  stem = 2 * math.prod(image_shape) * 3 * 3 * num_filters
  return 3 * inference(depth) - stem
