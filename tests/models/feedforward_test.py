"""VGG and AlexNet, in small."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from resnet_flax.models import feedforward, registry
from resnet_flax.models.feedforward import Conv, Pool
from resnet_flax.run import create


@functools.cache
def make(name="vgg", **overrides):
  """Both forms of the classifier, with few units."""
  config = base.get_config().model
  config.update({"name": name, "depth": {"vgg": 19, "alexnet": 8}[name]})
  config.update(overrides)
  return registry.create_model(config, num_classes=10).clone(
    features=(Conv(4), Pool(2), Conv(6, size=5, strides=2, pad=1), Pool(3)),
    pooled_size=2,
    hidden_sizes=(8, 12),
  )


def plain(name):
  """Without batch norm, which AlexNet never has."""
  return make(name) if name == "alexnet" else make(name, norm="none")


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
  assert set(init(plain(name))) == {"params"}


@pytest.mark.parametrize(
  ("name", "dropped"),
  [("vgg", (False, True, True)), ("alexnet", (True, True, False))],
)
def test_what_is_dropped(name, dropped):
  """VGG drops after its hidden layers, AlexNet before them."""
  model = plain(name)
  assert model.dropped == dropped
  variables = init(model)
  shares = {}

  def record(next_call, args, kwargs, context):
    name = context.module.name
    if name in ("dense1", "dense2", "head"):
      shares[name] = float(np.mean(np.asarray(args[0]) == 0))
    return next_call(*args, **kwargs)

  # An activation that is never 0 leaves zeros to dropout.
  model = model.clone(act=lambda x: x + 0.123)
  with nn.intercept_methods(record):
    model.apply(
      variables, images(64), train=True, rngs={"dropout": jax.random.key(1)}
    )
  expected = {
    name: 0.5 if is_dropped else 0.0
    for name, is_dropped in zip(shares, dropped, strict=True)
  }
  assert shares == pytest.approx(expected, abs=0.1)


def test_dropout_is_off_at_inference_and_keyed_in_training():
  model = make(norm="none")
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
  without = make(norm="none", dropout=0.0)
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


def test_alexnet_is_torchvisions():
  assert (
    Conv(64, size=11, strides=4, pad=2),
    Pool(3),
    Conv(192, size=5, strides=1, pad=2),
    Pool(3),
    Conv(384, size=3, strides=1, pad=1),
    Conv(256, size=3, strides=1, pad=1),
    Conv(256, size=3, strides=1, pad=1),
    Pool(3),
  ) == feedforward.ALEXNET


def test_pools_take_the_largest():
  """At stride 2, without padding."""
  model = make(norm="none").clone(
    features=(Conv(2, size=1, pad=0), Pool(3)), pooled_size=9
  )
  variables = init(model)
  seen = []

  def record(next_call, args, kwargs, context):
    if context.module.name in ("conv1", "dense1"):
      seen.append(np.asarray(args[0]))
    result = next_call(*args, **kwargs)
    if context.module.name == "conv1":
      seen.append(np.asarray(result))
    return result

  with nn.intercept_methods(record):
    model.apply(variables, images(), train=False)
  _, convolved, pooled = seen
  windows = np.lib.stride_tricks.sliding_window_view(
    np.maximum(convolved, 0), (3, 3), axis=(1, 2)
  )
  expected = windows[:, ::2, ::2].max((-1, -2))
  np.testing.assert_allclose(
    pooled.reshape(expected.shape), expected, rtol=1e-6
  )


@pytest.mark.parametrize(("name", "least"), [("vgg", 32), ("alexnet", 63)])
def test_images_of_which_nothing_is_left_are_refused(name, least):
  """Every image would give the same logits."""
  depth = {"vgg": 19, "alexnet": 8}[name]
  model = create.create_model(name, depth, 10)

  def trace(side):
    init = functools.partial(model.init, train=False)
    jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, side, side, 3)))

  trace(least)
  with pytest.raises(ValueError, match="too small"):
    trace(least - 1)
