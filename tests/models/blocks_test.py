import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.models import blocks


@pytest.mark.parametrize("size", [8, 7])
def test_subsample_and_pad(size):
  x = np.random.default_rng(0).normal(size=(2, size, size, 3))
  y = blocks.subsample_and_pad(jnp.asarray(x), 2, 8)
  expected = np.zeros((2, -(-size // 2), -(-size // 2), 8))
  for row in range(expected.shape[1]):
    for column in range(expected.shape[2]):
      # Five new channels: two before, three after.
      expected[:, row, column, 2:5] = x[:, 2 * row, 2 * column]
  np.testing.assert_allclose(y, expected, rtol=1e-6)
