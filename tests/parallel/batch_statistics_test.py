"""Batch norm of averaged weights, measured on training images."""

import jax
import numpy as np
import pytest

from resnet_flax.parallel import batch_statistics
from tests.helpers import assert_identical, changed, initial, layout_of


@pytest.fixture
def averaging_config(tiny_config):
  tiny_config.ema.decay = 0.9
  return tiny_config


def measured(config, num_devices=1):
  """The split, and the state before and after an epoch's end."""
  layout = layout_of(config, num_devices)
  experiment, split, state, _ = initial(config, layout)
  (one,) = layout.get(state)
  # The average is of its own, and at its end.
  average = jax.tree.map(lambda leaf: leaf + 0.125, one.variables)
  before = one.replace(average=average)
  hook = batch_statistics.create_hook(config, experiment, state, split, layout)
  (within,) = layout.get(hook(3, layout.put([before])))
  assert_identical(within, before)
  (after,) = layout.get(hook(4, layout.put([before])))
  return split, before, after


@pytest.mark.parametrize("num_devices", [1, 8])
def test_of_all_training_images(averaging_config, num_devices):
  """The first layer's, whose input does not depend on batches."""
  split, before, after = measured(averaging_config, num_devices)
  assert_identical(after.replace(average=None), before.replace(average=None))
  assert_identical(after.average["params"], before.average["params"])
  images = after.normalization(split.images)
  kernel = before.average["params"]["stem_conv"]
  outputs = jax.lax.conv_general_dilated(
    *(images, kernel["kernel"], (1, 1), "SAME"),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  outputs = np.float64(outputs) + kernel["bias"]
  found = after.average["batch_stats"]["stem_bn"]
  for name, function in (("mean", np.mean), ("var", np.var)):
    expected = function(outputs, axis=(0, 1, 2))
    np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)
  again = measured(averaging_config, num_devices)[-1]
  assert_identical(again, after)


def test_running_statistics_are_averaged_instead(averaging_config):
  averaging_config.average_batch_norm = "average"
  *_, before, after = measured(averaging_config)
  assert_identical(after, before)


def test_networks_without_batch_norm(averaging_config):
  config = changed(averaging_config)
  config.model.norm = "none"
  *_, before, after = measured(config)
  assert before.average["batch_stats"] == {}
  assert_identical(after, before)


def test_pool():
  rng = np.random.default_rng(0)
  values = rng.normal(100, 3, (5, 64, 2)).astype(np.float32)
  batches = [
    {"a": {"bn": {"mean": x.mean(0), "var": x.var(0)}}} for x in values
  ]
  pooled = batch_statistics.pool(batches)["a"]["bn"]
  everything = np.float64(values.reshape(-1, 2))
  np.testing.assert_allclose(pooled["mean"], everything.mean(0), rtol=1e-6)
  np.testing.assert_allclose(pooled["var"], everything.var(0), rtol=1e-5)
  assert pooled["var"].dtype == np.float32
