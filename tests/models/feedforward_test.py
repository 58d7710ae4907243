"""VGG and AlexNet, in small."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from resnet_flax import models
from resnet_flax.models import feedforward
from resnet_flax.models.feedforward import Conv, Pool


@functools.cache
def make(name="vgg", **overrides):
  """Both forms of the classifier, with few units."""
  config = base.get_config().model
  config.update({"name": name, "depth": {"vgg": 19, "alexnet": 8}[name]})
  config.update(overrides)
  return models.create_model(config, num_classes=10).clone(
    features=(Conv(4), Pool(2), Conv(6, size=5, strides=2, pad=1), Pool(3)),
    pooled_size=2,
    hidden_sizes=(8, 12),
    input_sizes=(8, 64),
  )


def images(batch=3):
  x = np.random.default_rng(0).normal(size=(batch, 20, 20, 3))
  return jnp.asarray(x, jnp.float32)


def init(model):
  return model.init(jax.random.key(0), images(), train=False)


def shapes(tree):
  return jax.tree.map(jnp.shape, tree)


def test_layers_and_shapes():
  variables = init(make())
  assert shapes(variables["params"]) == {
    "conv1": {"kernel": (3, 3, 3, 4), "bias": (4,)},
    "bn1": {"scale": (4,), "bias": (4,)},
    "conv2": {"kernel": (5, 5, 4, 6), "bias": (6,)},
    "bn2": {"scale": (6,), "bias": (6,)},
    "dense1": {"kernel": (2 * 2 * 6, 8), "bias": (8,)},
    "dense2": {"kernel": (8, 12), "bias": (12,)},
    "head": {"kernel": (12, 10), "bias": (10,)},
  }
  logits = make().apply(variables, images(), train=False)
  assert logits.shape == (3, 10)
  assert logits.dtype == jnp.float32


@pytest.mark.parametrize("name", ["vgg", "alexnet"])
def test_without_batch_norm_there_are_no_statistics(name):
  assert set(init(make(name, batch_norm=False))) == {"params"}


@pytest.mark.parametrize(
  ("name", "dropped"),
  [("vgg", (False, True, True)), ("alexnet", (True, True, False))],
)
def test_what_is_dropped(name, dropped):
  """VGG drops after its hidden layers, AlexNet before them."""
  model = make(name, batch_norm=False)
  assert model.dropped == dropped
  variables = init(model)
  seen = []

  def record(next_call, args, kwargs, context):
    if context.module.name in ("dense1", "dense2", "head"):
      seen.append(np.asarray(args[0]))
    return next_call(*args, **kwargs)

  from flax import linen as nn

  with nn.intercept_methods(record):
    model.apply(
      variables,
      images(64),
      train=True,
      rngs={"dropout": jax.random.key(1)},
      mutable=["batch_stats"],
    )
    dropping, seen = seen, []
    model.apply(variables, images(64), train=False)
  shares = [
    np.mean((x == 0) & (y != 0)) / np.mean(y != 0)
    for x, y in zip(dropping[:1], seen[:1], strict=True)
  ]
  # What comes later depends on what was dropped before.
  assert shares[0] == pytest.approx(0.5 if dropped[0] else 0, abs=0.1)


def test_dropout_is_off_at_inference_and_keyed_in_training():
  model = make(batch_norm=False)
  variables = init(model)

  def train(seed):
    return model.apply(
      variables, images(), train=True, rngs={"dropout": jax.random.key(seed)}
    )

  inference = model.apply(variables, images(), train=False)
  np.testing.assert_array_equal(
    inference, model.apply(variables, images(), train=False)
  )
  np.testing.assert_array_equal(train(0), train(0))
  assert np.abs(train(0) - train(1)).max() > 0
  without = make(batch_norm=False, dropout=0.0)
  np.testing.assert_array_equal(
    without.apply(
      variables, images(), train=True, rngs={"dropout": jax.random.key(0)}
    ),
    inference,
  )


def test_vgg19_is_the_papers():
  """Column E of table 1: 16 convolutions, 5 pools."""
  convs = [x.num_filters for x in feedforward.VGG19 if isinstance(x, Conv)]
  assert convs == [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
  assert feedforward.VGG19.count(Pool(2)) == 5
  assert feedforward.VGG19[-1] == Pool(2)
