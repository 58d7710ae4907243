"""Our networks against the Keras example's, in the real Keras on JAX.

The Keras side is written after the example's description: the layers get the
paths of our parameters as their names, so that weights are copied by name.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from resnet_flax import step as step_lib
from resnet_flax.models import registry
from resnet_flax.optim import optimizers
from tests.models.flax_batch_norm import FlaxBatchNorm

keras = pytest.importorskip("keras", reason="needs the extra [parity]")

L2 = 1e-4
BATCH = 2
STEPS = 10
# No batch is used in which a ReLU's input is nearer to 0 than this: there the
# derivative jumps, and float32 rounding would decide on which side we are.
KINK_MARGIN = 5e-6
# Of each stage the first block and one that follows, at an eighth of the work.
DEPTHS = [("resnet_v1", 14), ("resnet_v2", 20)]
SIZE = 16
FILTERS = 8


def keras_model(name, depth):
  """The example's model, v1 or v2, ending in logits."""
  layers = keras.layers

  def conv(x, filters, size, strides, path):
    return layers.Conv2D(
      filters,
      size,
      strides=strides,
      padding="same",
      kernel_initializer="he_normal",
      kernel_regularizer=keras.regularizers.L2(L2),
      name=path,
    )(x)

  def bn_relu(x, path, relu=True):
    x = layers.BatchNormalization(name=path)(x)
    return layers.ReLU()(x) if relu else x

  inputs = keras.Input((SIZE, SIZE, 3))
  x = bn_relu(conv(inputs, FILTERS, 3, 1, "stem_conv"), "stem_bn")
  filters_in = FILTERS
  for stage in range(3):
    for block in range((depth - 2) // (6 if name == "resnet_v1" else 9)):
      path = f"stage{stage + 1}_block{block + 1}_"
      strides = 2 if stage > 0 and block == 0 else 1
      if name == "resnet_v1":
        filters = FILTERS * 2**stage
        y = bn_relu(conv(x, filters, 3, strides, path + "conv1"), path + "bn1")
        y = conv(y, filters, 3, 1, path + "conv2")
        y = bn_relu(y, path + "bn2", relu=False)
        if stage > 0 and block == 0:
          x = conv(x, filters, 1, strides, path + "shortcut_conv")
        x = layers.ReLU()(layers.Add()([x, y]))
      else:
        filters_out = filters_in * (4 if stage == 0 else 2)
        y = x
        if stage > 0 or block > 0:
          y = bn_relu(y, path + "bn1")
        y = conv(y, filters_in, 1, strides, path + "conv1")
        y = conv(bn_relu(y, path + "bn2"), filters_in, 3, 1, path + "conv2")
        y = conv(bn_relu(y, path + "bn3"), filters_out, 1, 1, path + "conv3")
        if block == 0:
          x = conv(x, filters_out, 1, strides, path + "shortcut_conv")
        x = layers.Add()([x, y])
    if name == "resnet_v2":
      filters_in = filters_out
  if name == "resnet_v2":
    x = bn_relu(x, "final_bn")
  x = layers.Flatten()(layers.AveragePooling2D(SIZE // 4)(x))
  logits = layers.Dense(10, kernel_initializer="he_normal", name="head")(x)
  return keras.Model(inputs, logits)


_COLLECTIONS = {
  "kernel": ("params", "kernel"),
  "bias": ("params", "bias"),
  "gamma": ("params", "scale"),
  "beta": ("params", "bias"),
  "moving_mean": ("batch_stats", "mean"),
  "moving_variance": ("batch_stats", "var"),
}


def our_path(variable):
  """(collection, path) of a Keras variable, e.g. stage1_block1_bn1/gamma."""
  layer, weight = variable.path.split("/")[-2:]
  collection, leaf = _COLLECTIONS[weight]
  if layer.startswith("stage"):
    stage, block, *rest = layer.split("_")
    return collection, (f"{stage}_{block}", "_".join(rest), leaf)
  return collection, (layer, leaf)


def to_ours(variables, values):
  """Keras values as our nested {'params': ..., 'batch_stats': ...}."""
  tree = {}
  for variable, value in zip(variables, values, strict=True):
    collection, path = our_path(variable)
    node = tree.setdefault(collection, {})
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  return tree


def relative_error(ours, theirs):
  scale = np.abs(theirs).max()
  return np.abs(np.asarray(ours) - np.asarray(theirs)).max() / scale


def feeds_batch_norm(name, path):
  """Whether a parameter is a convolution's bias that a BN cancels.

  In v2 that is every one: whatever reads the residual stream is normalised,
  or a 1x1 convolution into the next stream. In v1 the projections' biases
  meet a ReLU first.
  """
  layer, leaf = path[-2:]
  if name == "resnet_v1" and layer == "shortcut_conv":
    return False
  return leaf == "bias" and "conv" in layer


@pytest.fixture(autouse=True)
def _keras_promotes_ranks():
  with jax.numpy_rank_promotion("allow"):
    yield


class Pair:
  """Our network and Keras's, and Keras's state."""

  def __init__(self, name, depth):
    keras.utils.set_random_seed(0)
    self.name = name
    self.theirs = keras_model(name, depth)
    config = base.get_config()
    config.model.update({"name": name, "depth": depth, "num_filters": FILTERS})
    self.ours = registry.create_model(config.model, 10)
    self.optimizer = optimizers.create_optimizer(config.optimizer)
    self.trainable = [v.value for v in self.theirs.trainable_variables]
    rng = np.random.default_rng(0)
    # Statistics and affine parameters that are not their initial 0 and 1.
    self.statistics = [
      jnp.asarray(rng.uniform(0.5, 1.5, v.shape), jnp.float32)
      for v in self.theirs.non_trainable_variables
    ]
    self.trainable = [
      value
      + (
        jnp.asarray(rng.uniform(-0.2, 0.2, value.shape), jnp.float32)
        if value.ndim == 1
        else 0.0
      )
      for value in self.trainable
    ]

  def our_variables(self):
    return to_ours(self.theirs.trainable_variables, self.trainable) | to_ours(
      self.theirs.non_trainable_variables, self.statistics
    )


@pytest.fixture(scope="module", params=DEPTHS, ids=lambda p: f"{p[0]}_{p[1]}")
def pair(request):
  return Pair(*request.param)


def batch(*seed):
  rng = np.random.default_rng(seed)
  images = rng.normal(0, 0.3, (BATCH, SIZE, SIZE, 3)).astype(np.float32)
  return jnp.asarray(images), jnp.asarray(rng.integers(0, 10, BATCH))


def kink_distance_fn(model):
  """A function of (variables, images): the least |x| that meets a ReLU."""

  def distance(variables, images):
    distances = []

    def recording_relu(x):
      distances.append(jnp.min(jnp.abs(x)))
      return jax.nn.relu(x)

    # Ours calls the activation in a trace of its own, which the distances
    # could not leave.
    recording = model.clone(
      act=recording_relu,
      norm=functools.partial(FlaxBatchNorm, **model.norm.keywords),
    )
    recording.apply(variables, images, train=True, mutable=["batch_stats"])
    return jnp.min(jnp.stack(distances))

  return jax.jit(distance)


def test_trees_match(pair):
  images, _ = batch(0)
  expected = jax.eval_shape(
    lambda: pair.ours.init(jax.random.key(0), images, train=False)
  )
  shapes = functools.partial(jax.tree.map, lambda x: x.shape)
  assert shapes(pair.our_variables()) == shapes(expected)


def test_inference_logits(pair):
  images, _ = batch(0)
  theirs, _ = jax.jit(
    functools.partial(pair.theirs.stateless_call, training=False)
  )(pair.trainable, pair.statistics, images)
  ours = jax.jit(functools.partial(pair.ours.apply, train=False))(
    pair.our_variables(), images
  )
  assert relative_error(ours, theirs) <= 1e-4


def test_ten_training_steps(pair):
  """Each from Keras's state: logits, statistics, loss with L2, gradients."""
  adam = keras.optimizers.Adam(1e-3, epsilon=1e-7)
  adam.build(pair.theirs.trainable_variables)
  adam_state = [v.value for v in adam.variables]

  @jax.jit
  def keras_step(trainable, statistics, adam_state, images, labels):
    def objective(trainable):
      logits, statistics_after, losses = pair.theirs.stateless_call(
        trainable, statistics, images, training=True, return_losses=True
      )
      crossentropy = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True
      )(labels, logits)
      return crossentropy + sum(losses), (logits, statistics_after)

    (loss, (logits, after)), grads = jax.value_and_grad(
      objective, has_aux=True
    )(trainable)
    trainable, adam_state = adam.stateless_apply(adam_state, grads, trainable)
    return loss, logits, after, grads, trainable, adam_state

  @jax.jit
  def our_step(variables, images, labels):
    grad_fn = jax.value_and_grad(step_lib.loss_fn, argnums=1, has_aux=True)
    (loss, (logits, updated)), grads = grad_fn(
      types.SimpleNamespace(model=pair.ours, label_smoothing=0.0),
      variables["params"],
      variables["batch_stats"],
      images,
      labels,
      jax.random.key(0),  # Nothing is dropped.
    )
    # The first link of the chain is the L2 term.
    params = variables["params"]
    decay = optax.add_decayed_weights(
      2 * L2,
      mask=lambda params: jax.tree_util.tree_map_with_path(
        optimizers.L2_WEIGHTS["conv_kernels"], params
      ),
    )
    grads, _ = decay.update(grads, decay.init(params), params)
    objective = loss + pair.optimizer.penalty(params)
    return objective, logits, updated["batch_stats"], grads

  kink_distance = kink_distance_fn(pair.ours)
  trainable, statistics = pair.trainable, pair.statistics
  for step in range(STEPS):
    variables = to_ours(pair.theirs.trainable_variables, trainable) | to_ours(
      pair.theirs.non_trainable_variables, statistics
    )
    images, labels = next(
      candidate
      for candidate in (batch(step, attempt) for attempt in range(1000))
      if kink_distance(variables, candidate[0]) > KINK_MARGIN
    )
    loss, logits, after, grads, trainable, adam_state = keras_step(
      trainable, statistics, adam_state, images, labels
    )
    our_loss, our_logits, our_stats, our_grads = our_step(
      variables, images, labels
    )
    statistics = after
    assert abs(our_loss - loss) / loss <= 1e-4
    assert relative_error(our_logits, logits) <= 1e-4
    expected_stats = to_ours(pair.theirs.non_trainable_variables, after)
    expected_grads = to_ours(pair.theirs.trainable_variables, grads)
    jax.tree.map(
      lambda a, b: np.testing.assert_array_less(relative_error(a, b), 1e-4),
      our_stats,
      expected_stats["batch_stats"],
    )
    for path, theirs in jax.tree_util.tree_leaves_with_path(
      expected_grads["params"]
    ):
      keys = tuple(key.key for key in path)
      ours = functools.reduce(lambda node, key: node[key], keys, our_grads)
      if feeds_batch_norm(pair.name, keys):
        assert np.abs(ours).max() < 1e-6
      else:
        assert relative_error(ours, theirs) <= 1e-4, (step, keys)
