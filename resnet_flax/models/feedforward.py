"""Networks older than ResNets: convolutions, pools and three dense layers.

VGG is Simonyan and Zisserman 2014 (arXiv:1409.1556). AlexNet is the single
tower of Krizhevsky 2014 (arXiv:1404.5997), without response normalisation. Both
have torchvision's layout.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from resnet_flax.models import layers
from resnet_flax.models.blocks import Activation, ModuleDef


@dataclasses.dataclass(frozen=True)
class Conv:
  """A convolution, a normalisation and an activation."""

  num_filters: int
  size: int = 3  # Height and width of the kernel.
  strides: int = 1
  pad: int = 1  # Zeros on every side.


@dataclasses.dataclass(frozen=True)
class Pool:
  """A max pool at stride 2, without padding."""

  size: int  # Height and width of the window.


VGG19 = tuple(
  layer
  for num, filters in ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))
  for layer in [*[Conv(filters)] * num, Pool(2)]
)

ALEXNET = (
  *(Conv(64, size=11, strides=4, pad=2), Pool(3)),
  *(Conv(192, size=5, pad=2), Pool(3)),
  *(Conv(384), Conv(256), Conv(256), Pool(3)),
)

# Networks by `model.name`. AlexNet has no batch norm, which is newer.
NETWORKS: dict[str, dict[str, Any]] = {
  "vgg": {
    "features": VGG19,
    "pooled_size": 7,
    "dropped": (False, True, True),
  },
  "alexnet": {
    "features": ALEXNET,
    "pooled_size": 6,
    "dropped": (True, True, False),
  },
}


class FeedForward(nn.Module):
  """Convolutions and pools, an average pool, two hidden dense layers, a head.

  `conv`, `norm` and `dense` are partials, as in `resnet.ResNet`.
  """

  features: Sequence[Conv | Pool]
  pooled_size: int  # Height and width of the dense layers' input.
  # Whether dropout applies to the input of each dense layer and of the head.
  dropped: Sequence[bool]
  dropout: float  # Share of dropped units; training needs a `dropout` key.
  num_classes: int
  conv: ModuleDef
  norm: ModuleDef
  dense: ModuleDef
  input_size: int  # See `layers.resize`.
  hidden_sizes: Sequence[int] = (4096, 4096)  # Units of hidden dense layers.
  act: Activation = nn.relu

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """float32[B, num_classes] logits of normalised float[B, H, W, C] images.

    Raises `ValueError` if the images are too small: the pools leave no pixel.
    """
    x = images = layers.resize(images, self.input_size)
    number = 0
    for layer in self.features:
      window = layer.size, layer.size
      if isinstance(layer, Pool):
        x = nn.max_pool(x, window, (2, 2))
        continue
      number += 1
      pads = [(layer.pad, layer.pad)] * 2
      conv = functools.partial(self.conv, pads=pads, name=f"conv{number}")
      x = conv(layer.num_filters, window, layer.strides)(x)
      norm = functools.partial(self.norm, act=self.act, name=f"bn{number}")
      x = norm(use_running_average=not train)(x)
    if 0 in x.shape[1:3]:
      height, width = images.shape[1:3]
      raise ValueError(
        f"{height}x{width} images are too small: the pools leave no pixel. Pass"
        " input_size=224, or larger images without input_size."
      )
    x = adaptive_average_pool(x, self.pooled_size)
    x = x.reshape(x.shape[0], -1)
    drop = functools.partial(nn.Dropout(self.dropout), deterministic=not train)
    for k, size in enumerate(self.hidden_sizes):
      x = drop(x) if self.dropped[k] else x
      x = self.act(self.dense(size, name=f"dense{k + 1}")(x))
    x = drop(x) if self.dropped[-1] else x
    return self.dense(self.num_classes, name="head")(x).astype(jnp.float32)


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
  """Means over windows that cover the image, float[B, size, size, C].

  Window i of a side of length n goes from floor(i * n / size) to
  ceil((i + 1) * n / size), as in PyTorch. A size x size image is unchanged.
  """
  if x.shape[1:3] == (size, size):
    return x
  weights = []  # float32[window, pixel], for rows and then for columns.
  for length in x.shape[1:3]:
    i, pixel = np.ogrid[:size, :length]
    start, stop = i * length // size, -(-(i + 1) * length // size)
    shares = ((start <= pixel) & (pixel < stop)) / (stop - start)
    weights.append(shares.astype(np.float32))
  rows, columns = weights
  pooled = jnp.einsum(
    "ph,bhwc,qw->bpqc", rows, x, columns, precision=jax.lax.Precision.HIGHEST
  )
  return pooled.astype(x.dtype)
