import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.models import feedforward, layers


def images(height, width):
  x = np.random.default_rng(0).normal(size=(2, height, width, 3))
  return x.astype(np.float32)


@pytest.mark.parametrize(
  ("height", "width", "size"), [(6, 6, 6), (6, 6, 3), (7, 5, 3), (2, 1, 4)]
)
def test_adaptive_average_pool(height, width, size):
  """Against the windows' definition."""
  x = images(height, width)
  expected = np.empty((2, size, size, 3), np.float32)
  for i in range(size):
    for j in range(size):
      rows = slice(i * height // size, -(-(i + 1) * height // size))
      columns = slice(j * width // size, -(-(j + 1) * width // size))
      expected[:, i, j] = x[:, rows, columns].mean((1, 2))
  pooled = feedforward.adaptive_average_pool(jnp.asarray(x), size)
  np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)


def test_window_pads():
  assert layers.window_pads("same", (3, 3)) == "SAME"
  assert layers.window_pads("symmetric", (7, 3)) == [(3, 3), (1, 1)]


def test_resize():
  """A constant stays one; a gradient stays between its ends and monotone."""
  ramp = jnp.broadcast_to(jnp.arange(8.0)[None, None, :, None], (1, 8, 8, 1))
  resized = np.asarray(layers.resize(ramp, 16))
  assert resized.shape == (1, 16, 16, 1)
  # Half-pixel centres: the first new pixel lies outside of the first old one.
  np.testing.assert_allclose(resized[0, 0, :4, 0], [0, 0.25, 0.75, 1.25])
  assert (np.diff(resized[0, 0, :, 0]) >= 0).all()


def test_resize_leaves_the_right_size_alone():
  x = jnp.asarray(images(8, 8))
  np.testing.assert_array_equal(layers.resize(x, 8), x)
  np.testing.assert_array_equal(layers.resize(x, 0), x)
