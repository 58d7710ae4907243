"""Group norm and weight standardisation against their papers' formulas."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from resnet_flax.models import group_norm, registry


@pytest.mark.parametrize(
  ("channels", "groups"), [(4, 1), (16, 2), (28, 1), (64, 8), (320, 32)]
)
def test_group_norm_is_wu_and_hes_formula(channels, groups):
  """Equations 1, 2, 6 and 7, in loops over images and groups."""
  rng = np.random.default_rng(0)
  x, residual = rng.normal(1, 2, (2, 3, 5, 5, channels)).astype(np.float32)
  module = group_norm.GroupNorm(use_running_average=False, act=nn.relu)
  scale, bias = rng.normal(size=(2, channels)).astype(np.float32)
  variables = module.init(jax.random.key(0), x)
  assert jax.tree.map(jnp.shape, variables) == {
    "params": {"scale": (channels,), "bias": (channels,)}
  }
  expected = np.empty_like(x)
  width = channels // groups
  for image in range(len(x)):
    for k in range(groups):
      part = slice(k * width, (k + 1) * width)
      values = x[image, ..., part]
      mean, var = values.mean(), values.var()
      expected[image, ..., part] = (values - mean) / np.sqrt(var + 1e-5)
  expected = np.maximum(residual + expected * scale + bias, 0)
  params = {"params": {"scale": scale, "bias": bias}}
  found = module.apply(params, x, residual)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_weight_standardization_is_qiao_et_als_formula():
  """Equations 6 to 8, in a loop over output channels."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 6, 6, 3)).astype(np.float32)
  kernel = rng.normal(1, 3, (3, 3, 3, 4)).astype(np.float32)
  standardized = np.empty_like(kernel)
  for k in range(4):
    of_channel = kernel[..., k]
    deviation = np.sqrt(of_channel.var() + 1e-5)
    standardized[..., k] = (of_channel - of_channel.mean()) / deviation
  options = {
    "window_strides": (1, 1),
    "padding": "SAME",
    "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
  }
  np.testing.assert_allclose(
    group_norm.standardize(None)(x, kernel, **options),
    jax.lax.conv_general_dilated(x, standardized, **options),
    rtol=1e-4,
    atol=1e-4,
  )


def test_every_convolution_of_a_network_is_standardized():
  """Scaling and shifting kernels changes nothing but rounding."""
  config = base.get_config().model
  config.update({"depth": 8, "num_filters": 8, "norm": "group_norm"})
  config.weight_standardization = True
  model = registry.create_model(config, 10)
  x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
  variables = model.init(jax.random.key(0), x, train=False)
  assert set(variables) == {"params"}
  moved = jax.tree.map(
    lambda w: 3 * w + 1 if w.ndim == 4 else w, variables["params"]
  )
  np.testing.assert_allclose(
    model.apply({"params": moved}, x, train=True),
    model.apply(variables, x, train=False),
    rtol=1e-3,
    atol=1e-3,
  )
