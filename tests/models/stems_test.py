"""Stems against their definitions."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.models import layers, stems
from resnet_flax.models.kernels import batch_norm

PADS = {"same": (0, 1), "symmetric": (1, 1)}


class Stem(nn.Module):
  """A stem at inference, whose convolution and norm have their names."""

  stem: Callable[..., jax.Array]
  padding: str  # Of the convolution.

  @nn.compact
  def __call__(self, x):
    return self.stem(
      x,
      4,
      conv=functools.partial(
        layers.conv, padding=self.padding, use_bias=False, dtype=jnp.float32
      ),
      norm=functools.partial(
        batch_norm.BatchNorm, use_running_average=True, act=nn.relu
      ),
    )


def images(size):
  x = np.random.default_rng(0).normal(size=(2, size, size, 3))
  return jnp.asarray(x, jnp.float32)


def convolve(variables, x, strides, pads):
  kernel = variables["params"]["stem_conv"]["kernel"]
  y = jax.lax.conv_general_dilated(
    x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  # Running statistics are 0 and 1.
  return nn.relu(y / np.sqrt(1 + 1e-5))


@pytest.mark.parametrize("padding", PADS)
def test_large_images(padding):
  """7x7 at stride 2, then the largest of 3x3 at stride 2."""
  x = images(16)
  stem = Stem(functools.partial(stems.large_images, padding=padding), padding)
  variables = stem.init(jax.random.key(0), x)
  pads = {"same": (2, 3), "symmetric": (3, 3)}[padding]
  y = np.asarray(convolve(variables, x, (2, 2), [pads, pads]))
  before, after = PADS[padding]
  wide = np.pad(
    y,
    ((0, 0), (before, after), (before, after), (0, 0)),
    constant_values=-np.inf,
  )
  expected = np.empty((2, 4, 4, 4))
  for i in range(4):
    for j in range(4):
      window = wide[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
      expected[:, i, j] = window.max((1, 2))
  np.testing.assert_allclose(
    stem.apply(variables, x), expected, rtol=1e-4, atol=1e-5
  )


def test_small_images():
  x = images(8)
  stem = Stem(stems.small_images, "same")
  variables = stem.init(jax.random.key(0), x)
  expected = convolve(variables, x, (1, 1), "SAME")
  np.testing.assert_allclose(
    stem.apply(variables, x), expected, rtol=1e-4, atol=1e-5
  )
