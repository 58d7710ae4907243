"""How much arithmetic the recipe's ResNet v1 takes on one image.

Only the multiply-adds of convolutions and the dense layer count, each as two
operations; products with padding are counted as well. What batch norm, ReLU
and the optimizer do is left out, as is customary: it takes time, not flops.
"""

import functools
import math

from configs import v1_depth20
from resnet_flax import models
from resnet_flax.run import experiment as experiment_lib
from resnet_flax.tools import summary


@functools.cache
def inference(depth: int) -> int:
  """Floating-point operations of predicting one image.

  Args:
    depth: 6n+2.
  """
  config = v1_depth20.get_config()
  config.model.depth = depth
  experiment = experiment_lib.build(config)
  return (
    2
    * summary.measure_size(
      experiment.model, experiment.image_shape
    ).multiply_adds
  )


def training(depth: int) -> int:
  """Floating-point operations of training on one image.

  Each layer's two gradients take as much as its result does; nobody needs the
  gradient of the images.

  Args:
    depth: 6n+2.
  """
  config = v1_depth20.get_config()
  image_shape = experiment_lib.build(config).image_shape
  num_filters = models.num_filters(config.model)
  stem = 2 * math.prod(image_shape) * 3 * 3 * num_filters
  return 3 * inference(depth) - stem
