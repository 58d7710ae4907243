"""Networks from before residual ones: convolutions and pools, three dense.

VGG is Simonyan and Zisserman 2014 (arXiv:1409.1556), AlexNet Krizhevsky et al.
2012 in the single-tower form of Krizhevsky 2014 (arXiv:1404.5997), both in
torchvision's layout.
"""

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_flax.models import layers
from resnet_flax.models.blocks import ModuleDef
from resnet_flax.models.kernels.batch_norm import Activation


@dataclasses.dataclass(frozen=True)
class Conv:
  """A convolution, what the network normalises with, and an activation.

  Attributes:
    num_filters: channels that come out.
    size: height and width of the kernel.
    strides: in both directions.
    pad: zeros on every side.
  """

  num_filters: int
  size: int = 3
  strides: int = 1
  pad: int = 1


@dataclasses.dataclass(frozen=True)
class Pool:
  """A max pool at stride 2, without padding.

  Attributes:
    size: height and width of the window.
  """

  size: int


VGG19 = tuple(
  layer
  for num_convs, num_filters in (
    (2, 64),
    (2, 128),
    (4, 256),
    (4, 512),
    (4, 512),
  )
  for layer in [*[Conv(num_filters)] * num_convs, Pool(2)]
)

ALEXNET = (
  Conv(64, size=11, strides=4, pad=2),
  Pool(3),
  Conv(192, size=5, pad=2),
  Pool(3),
  Conv(384),
  Conv(256),
  Conv(256),
  Pool(3),
)


class FeedForward(nn.Module):
  """Convolutions and pools, an average pool, two hidden dense layers, a head.

  Attributes:
    features: the convolutions and pools.
    pooled_size: height and width of what the dense layers see.
    hidden_sizes: units of the hidden dense layers.
    dropped: for each dense layer and then the head, whether its input is
      dropped out.
    dropout: the share of units that are dropped.
    num_classes: size of the head.
    conv, norm, dense: partials, as of `resnet.ResNet`.
    input_size, input_sizes: see `layers.fit`.
    act: the activation function.
  """

  features: Sequence[Conv | Pool]
  pooled_size: int
  hidden_sizes: Sequence[int]
  dropped: Sequence[bool]
  dropout: float
  num_classes: int
  conv: ModuleDef
  norm: ModuleDef
  dense: ModuleDef
  input_size: int
  input_sizes: tuple[int, int]
  act: Activation = nn.relu

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Classifies normalised images.

    Args:
      images: float[B, H, W, C], 224x224 in the papers.
      train: batch statistics (updating `batch_stats`) or running ones, and
        whether units are dropped, which takes a `dropout` key.

    Returns:
      float32[B, num_classes] logits.

    Raises:
      ConfigError: the network is not made for images of this size.
    """
    x = layers.fit(images, self.input_size, self.input_sizes)
    number = 0
    for layer in self.features:
      if isinstance(layer, Pool):
        x = nn.max_pool(x, (layer.size, layer.size), (2, 2))
        continue
      number += 1
      x = self.conv(
        layer.num_filters,
        (layer.size, layer.size),
        layer.strides,
        pads=[(layer.pad, layer.pad)] * 2,
        name=f"conv{number}",
      )(x)
      x = self.norm(
        use_running_average=not train, act=self.act, name=f"bn{number}"
      )(x)
    x = layers.adaptive_average_pool(x, self.pooled_size)
    x = x.reshape(x.shape[0], -1)
    drop = functools.partial(
      nn.Dropout(self.dropout).__call__, deterministic=not train
    )
    for k, size in enumerate(self.hidden_sizes):
      x = drop(x) if self.dropped[k] else x
      x = self.act(self.dense(size, name=f"dense{k + 1}")(x))
    x = drop(x) if self.dropped[-1] else x
    return self.dense(self.num_classes, name="head")(x).astype(jnp.float32)
