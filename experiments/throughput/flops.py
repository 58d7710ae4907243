"""How much arithmetic the recipe's ResNet v1 takes, counted layer by layer.

Only the multiply-adds of convolutions and the dense layer count, each as two
operations; products with padding are counted as well. What batch norm, ReLU
and the optimizer do is left out, as is customary: it takes time, not flops.
"""

_SIZE, _CHANNELS, _FILTERS, _NUM_CLASSES = 32, 3, 16, 10


def layers(depth: int) -> list[int]:
  """Multiply-adds of one image in each layer, the stem's first.

  Args:
    depth: 6n+2.
  """

  def conv(size: int, kernel: int, inputs: int, filters: int) -> int:
    return size**2 * kernel**2 * inputs * filters

  counts = [conv(_SIZE, 3, _CHANNELS, _FILTERS)]
  inputs = _FILTERS
  for stage in range(3):
    size, filters = _SIZE // 2**stage, _FILTERS * 2**stage
    for _ in range((depth - 2) // 6):
      counts.append(conv(size, 3, inputs, filters))
      counts.append(conv(size, 3, filters, filters))
      if inputs != filters:
        counts.append(conv(size, 1, inputs, filters))
      inputs = filters
  return [*counts, inputs * _NUM_CLASSES]


def inference(depth: int) -> int:
  """Floating-point operations of predicting one image."""
  return 2 * sum(layers(depth))


def training(depth: int) -> int:
  """Floating-point operations of training on one image.

  Each layer's two gradients take as much as its result does; nobody needs the
  gradient of the images.
  """
  counts = layers(depth)
  return 2 * (3 * sum(counts) - counts[0])
