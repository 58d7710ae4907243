import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from resnet_flax import step as step_lib
from resnet_flax.data import normalize
from resnet_flax.models import feedforward
from resnet_flax.optim import any_optax, optimizers
from resnet_flax.run import experiment as experiment_lib


def make_experiment(name="resnet_v1", depth=8):
  config = base.get_config()
  config.model.update({"name": name, "depth": depth, "num_filters": 4})
  config.augment.name = "none"
  config.batch_size = 4
  return experiment_lib.build(config)


@pytest.fixture(scope="module")
def experiment():
  return make_experiment()


def create_state(experiment):
  return step_lib.create_train_state(
    experiment,
    jax.random.key(0),
    normalize.placeholder("pixel_mean", experiment.image_shape),
  )


@pytest.fixture(scope="module")
def state(experiment):
  return create_state(experiment)


def jitted(experiment):
  return jax.jit(functools.partial(step_lib.train_step, experiment))


@pytest.fixture(scope="module")
def step(experiment):
  """The training step of the plain network, compiled once."""
  return jitted(experiment)


@pytest.fixture(scope="module")
def eval_step(experiment):
  return jax.jit(functools.partial(step_lib.eval_step, experiment))


def batch(count=4):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
  return jnp.asarray(images), jnp.asarray(np.arange(count) % 10, jnp.int32)


@pytest.mark.parametrize(
  "optimizer", [*optimizers.OPTIMIZERS, *any_optax.OPTIMIZERS]
)
@pytest.mark.parametrize("normalization", ["pixel_mean", "channel", "caffe"])
def test_the_state_has_the_same_form_with_x64(optimizer, normalization):
  """A checkpoint opens where somebody's notebook has set jax_enable_x64."""
  config = base.get_config()
  config.model.update({"depth": 8, "num_filters": 4})
  config.optimizer.name = optimizer
  config.normalization = normalization
  config.plateau.enabled = True
  config.schedule.warmup_learning_rate = 1e-3
  config.schedule.warmup_min_depth = 0

  def form():
    experiment = experiment_lib.build(config)
    return experiment_lib.abstract_state(config, experiment)

  expected = form()
  with jax.enable_x64(True):
    assert form() == expected


@pytest.mark.parametrize(
  "name", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)]
)
def test_accumulated_steps_are_a_larger_batch(name):
  """Without batch norm, 8 batches of 16 images equal one of 128."""
  config = base.get_config()
  config.model.update({"depth": 8, "num_filters": 4, "norm": "none"})
  config.optimizer.update({"name": name, "clip_norm": 0.1})
  config.augment.name = "none"
  images, labels = batch(128)
  states = []
  for size in (128, 16):
    config.batch_size = size
    config.optimizer.accumulate_steps = 128 // size
    experiment = experiment_lib.build(config)
    step, state = jitted(experiment), create_state(experiment)
    for start in range(0, 128, size):
      part = slice(start, start + size)
      state, _ = step(state, images[part], labels[part], jax.random.key(0))
    states.append(state.params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *states
  )


def test_sums_of_the_epoch(experiment, state, step):
  """They add up within an epoch and start anew with the next."""
  steps = experiment.learning_rate.steps_per_epoch
  images, labels = batch()
  key = jax.random.key(0)
  state, first = step(state, images, labels, key)
  state, second = step(state, images, labels, key)
  assert int(first.sums["count"]) == 4
  assert int(second.sums["count"]) == 8
  assert float(second.sums["loss"]) > float(first.sums["loss"]) > 0
  state, _ = step(state.replace(step=jnp.asarray(steps)), images, labels, key)
  assert int(state.epoch_sums["count"]) == 4
  assert int(state.step) == steps + 1


@pytest.mark.parametrize("ties", [False, True])
def test_top5(ties):
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(200, 12)).astype(np.float32)
  scores = np.round(scores) if ties else scores
  labels = rng.integers(0, 12, 200)
  first = np.argsort(-scores, axis=-1, kind="stable")[:, :5]
  expected = (first == labels[:, None]).any(axis=-1)
  assert 0 < expected.sum() < 200
  np.testing.assert_array_equal(step_lib.in_top5(scores, labels), expected)
  found = jax.jit(step_lib.in_top5)(scores, labels)
  np.testing.assert_array_equal(found, expected)
  mask = np.arange(200) % 2 == 0
  sums = step_lib.metric_sums(0.0, 0.0, jnp.asarray(scores), labels, mask)
  assert sums["top5"] == (expected & mask).sum()
  # Of NaN logits, no label is among the first five.
  assert not step_lib.in_top5(np.full_like(scores, np.nan), labels).any()


def test_few_classes_have_no_top5():
  nine, ones = jnp.zeros((4, 9)), jnp.ones(4, bool)
  sums = step_lib.metric_sums(0.0, 0.0, nine, jnp.zeros(4, int), ones)
  assert sums.keys() == {"loss", "objective", "accuracy", "count"}


def test_norms_of_gradient_and_weights(experiment, state, step):
  images, labels = batch()
  logging = dataclasses.replace(experiment, log_norms=True)
  logged = create_state(logging)
  logged, found = jitted(logging)(logged, images, labels, jax.random.key(0))
  _, grads = jax.value_and_grad(step_lib.loss_fn, argnums=1, has_aux=True)(
    *(experiment, state.params, state.batch_stats),
    *(state.normalization(images), labels, jax.random.key(0)),
  )
  for name, tree in (("gradient_norm", grads), ("weight_norm", state.params)):
    expected = np.sqrt(sum(np.sum(w**2) for w in jax.tree.leaves(tree)))
    assert float(found.sums[name]) / 4 == pytest.approx(expected, rel=1e-4)
  # And they change nothing.
  other, _ = step(state, images, labels, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, logged.params, other.params)


def test_objective_is_loss_plus_penalty(experiment, state, step):
  images, labels = batch()
  _, step_metrics = step(state, images, labels, jax.random.key(0))
  penalty = experiment.optimizer.penalty(state.params)
  np.testing.assert_allclose(
    step_metrics.sums["objective"],
    step_metrics.sums["loss"] + 4 * penalty,
    rtol=1e-5,
  )


@pytest.mark.parametrize("part", ["params", "batch_stats", "opt_state"])
def test_non_finite_state_is_reported(state, step, part):
  poisoned = jax.tree.map(
    lambda x: (
      jnp.full_like(x, jnp.inf) if jnp.issubdtype(x.dtype, jnp.inexact) else x
    ),
    getattr(state, part),
  )
  images, labels = batch()
  _, good = step(state, images, labels, jax.random.key(0))
  assert bool(good.finite)
  _, bad = step(
    state.replace(**{part: poisoned}), images, labels, jax.random.key(0)
  )
  assert not bool(bad.finite)


def test_randomness_depends_on_the_step_alone():
  config = base.get_config()
  config.model.update({"depth": 8, "num_filters": 4})
  config.batch_size = 4
  experiment = experiment_lib.build(config)
  state = create_state(experiment)
  images, labels = batch()
  step = jitted(experiment)

  def loss_at(number):
    start = state.replace(step=jnp.asarray(number))
    return float(step(start, images, labels, jax.random.key(0))[1].sums["loss"])

  assert loss_at(0) == loss_at(0)
  assert loss_at(0) != loss_at(1562)


@pytest.fixture(scope="module")
def dropping():
  """A small network that drops units and has no statistics."""
  config = base.get_config()
  config.model.update({"name": "vgg", "depth": 19, "input_size": 64})
  config.model.norm = "none"
  config.augment.name = "none"
  config.batch_size = 4
  experiment = experiment_lib.build(config)
  model = experiment.model.clone(
    features=(feedforward.Conv(4), feedforward.Pool(2)),
    pooled_size=2,
    hidden_sizes=(32, 32),
    input_size=0,
  )
  experiment = dataclasses.replace(experiment, model=model)
  return create_state(experiment), jitted(experiment)


def test_dropout_depends_on_the_step_alone(dropping):
  state, step = dropping
  images, labels = batch()

  def loss_at(number, seed=0):
    start = state.replace(step=jnp.asarray(number))
    key = jax.random.key(seed)
    return float(step(start, images, labels, key)[1].sums["loss"])

  assert loss_at(0) == loss_at(0)
  # The first steps of two epochs, which start their sums anew.
  assert loss_at(0) != loss_at(12_500)
  assert loss_at(0) != loss_at(0, seed=1)


def test_network_without_statistics_trains(dropping):
  state, step = dropping
  assert state.batch_stats == {}
  images, labels = batch()
  new, step_metrics = step(state, images, labels, jax.random.key(0))
  assert bool(step_metrics.finite)
  assert new.batch_stats == {}
  moved = jax.tree.map(
    lambda a, b: bool(jnp.any(a != b)), state.params, new.params
  )
  assert all(jax.tree.leaves(moved))


def test_smoothed_labels_are_those_of_szegedy_et_al(experiment, state):
  images, labels = batch()
  smoothed = dataclasses.replace(experiment, label_smoothing=0.1)

  def loss(experiment):
    value, (logits, _) = jax.jit(
      functools.partial(step_lib.loss_fn, experiment)
    )(
      state.params,
      state.batch_stats,
      state.normalization(images),
      labels,
      jax.random.key(0),
    )
    return float(value), np.asarray(jax.nn.log_softmax(logits), np.float64)

  (hard, log_p), (soft, _) = loss(experiment), loss(smoothed)
  # 90 % of the label's share stay, 10 % go to the ten classes alike.
  expected = 0.9 * hard - 0.1 * log_p.mean()
  assert soft == pytest.approx(expected, rel=1e-5)
  assert abs(soft - hard) > 1e-3
  _, reported = jitted(smoothed)(state, images, labels, jax.random.key(0))
  assert float(reported.sums["loss"]) / 4 == pytest.approx(soft, rel=1e-5)


def test_targets_may_be_probabilities(experiment, state, step):
  """Mixed labels are probabilities; one-hot targets count as labels do."""
  images, labels = batch()

  def sums(step):
    return step(state, images, labels, jax.random.key(0))[1].sums

  def mixed(augment):
    return sums(jitted(dataclasses.replace(experiment, augment=augment)))

  plain = sums(step)
  one_hot = mixed(lambda key, images, labels: (images, jnp.eye(10)[labels]))
  for name, value in plain.items():
    np.testing.assert_allclose(one_hot[name], value, rtol=1e-5)

  def mix(key, images, labels):
    targets = jnp.eye(10)[labels]
    return images, 0.75 * targets + 0.25 * targets[::-1]

  logits = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
  _, targets = mix(None, images, labels)
  expected = -(targets * jax.nn.log_softmax(logits)).sum(-1)
  np.testing.assert_allclose(
    step_lib.cross_entropy(jnp.asarray(logits), targets), expected, rtol=1e-5
  )
  # The loss is linear in the targets.
  swapped = step(state, images, labels[::-1], jax.random.key(0))[1].sums
  np.testing.assert_allclose(
    mixed(mix)["loss"],
    0.75 * plain["loss"] + 0.25 * swapped["loss"],
    rtol=1e-5,
  )


def test_probabilities_of_crops_are_averaged(experiment, state, eval_step):
  crops, _ = batch(6)
  crops = crops.reshape(2, 3, *crops.shape[1:])
  labels = jnp.array([1, 2])
  mask = jnp.array([True, False])
  sums, probabilities = eval_step(state, crops, labels, mask)
  apply = jax.jit(functools.partial(step_lib.apply_eval, experiment.model))
  expected = np.mean(
    [jax.nn.softmax(apply(state, crops[:, k])) for k in range(3)], axis=0
  )
  np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
  assert int(sums["count"]) == 1
  assert float(sums["loss"]) == pytest.approx(-np.log(expected[0, 1]), rel=1e-5)
  # Not what the mean of the logits gives.
  means = apply(state, crops.reshape(-1, 32, 32, 3)).reshape(2, 3, -1)
  assert np.abs(jax.nn.softmax(means.mean(1)) - expected).max() > 1e-6


def test_keys_of_a_step_differ():
  keys = [
    jax.random.key_data(key).tolist()
    for step in (0, 1, 2**31 - 1)
    for key in step_lib.step_keys(jax.random.key(0), step).values()
  ]
  assert len({tuple(key) for key in keys}) == 6


def test_eval_step_counts_what_the_mask_lets_through(state, eval_step):
  images, labels = batch(6)
  mask = jnp.asarray([True, True, False, True, False, True])
  score = functools.partial(eval_step, state)
  masked, _ = score(images, labels, mask)
  kept, _ = score(images[mask], labels[mask], jnp.ones(4, bool))
  assert int(masked["count"]) == 4
  assert int(masked["accuracy"]) == int(kept["accuracy"])
  np.testing.assert_allclose(masked["loss"], kept["loss"], rtol=1e-5)
  np.testing.assert_allclose(masked["objective"], kept["objective"], rtol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
  ("name", "depth"), [("resnet_v1", 8), ("resnet_v2", 11)]
)
def test_step_lowers_for_accelerators(name, depth, platform):
  experiment = make_experiment(name, depth)
  state = jax.eval_shape(lambda: create_state(experiment))
  exported = jax.export.export(
    jax.jit(
      functools.partial(step_lib.train_step, experiment), donate_argnums=0
    ),
    platforms=[platform],
  )(
    state,
    jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8),
    jax.ShapeDtypeStruct((4,), jnp.int32),
    jax.eval_shape(lambda: jax.random.key(0)),
  )
  assert exported.platforms == (platform,)
  text = exported.mlir_module()
  kernels = sum(leaf.ndim == 4 for leaf in jax.tree.leaves(state.params))
  # Forward and weight gradient of each, input gradient of all but the stem.
  convolutions = len(re.findall(r"stablehlo\.convolution", text))
  assert convolutions == 3 * kernels - 1


class Linear(nn.Module):
  """A network that sees the means of the left half, compiled at once."""

  @nn.compact
  def __call__(self, images, *, train):
    return nn.Dense(10, name="head")(images[:, :, :16].mean((1, 2)))


def linear(changes, normalization=None):
  """A jitted step of a linear network, its state, and four images."""
  config = base.get_config()
  config.update_from_flattened_dict(
    {"augment.name": "none", "optimizer.l2_weights": "kernels"} | changes
  )
  experiment = dataclasses.replace(experiment_lib.build(config), model=Linear())
  state = step_lib.create_train_state(
    experiment,
    jax.random.key(0),
    normalization or normalize.placeholder("pixel_mean", (32, 32, 3)),
  )
  pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
  step = jax.jit(
    functools.partial(step_lib.train_step_and_gradient, experiment)
  )
  steps = experiment.learning_rate.steps_per_epoch
  return step, state, (jnp.asarray(pixels), jnp.arange(4)), steps


WARM_UP = {
  "optimizer.name": "sgd",
  "optimizer.momentum": 0.0,
  "optimizer.learning_rate": 0.5,
  "optimizer.l2": 0.0,
  "schedule.warmup_learning_rate": 0.01,
  "schedule.warmup_min_depth": 0,
}


def test_a_step_is_as_long_as_the_rate_that_it_reports():
  step, state, batch, _ = linear(WARM_UP)
  new, reported, gradient, _ = step(state, *batch, jax.random.key(0))
  assert reported.learning_rate == pytest.approx(0.01)
  jax.tree.map(
    lambda old, g, new: np.testing.assert_allclose(
      new, old - 0.01 * g, rtol=1e-5, atol=1e-7
    ),
    *(state.params, gradient, new.params),
  )


def test_the_warm_up_waits_for_the_error():
  step, state, batch, _ = linear(WARM_UP)
  new, reported, *_ = step(state, *batch, jax.random.key(0))
  error = 1 - float(reported.sums["accuracy"]) / 4
  assert error > 0.5
  estimate = float(new.rate_state["warmup_error"])
  assert estimate == pytest.approx(0.98 + 0.02 * error, rel=1e-6)


def test_bytes_change_with_the_epoch():
  step, state, batch, steps = linear({"augment.alternating_flip": True})

  def loss_at(number):
    start = state.replace(step=jnp.asarray(number))
    return float(step(start, *batch, jax.random.key(0))[1].sums["loss"])

  first, *same, mirrored, again = map(
    loss_at, (0, 1, steps - 1, steps, 2 * steps)
  )
  assert same == [first, first]
  assert mirrored != first == again


def test_images_are_normalised_before_they_are_moved():
  """White images with a white mean become 0, and so does the padding."""
  white = normalize.Normalization(jnp.ones((32, 32, 3)), jnp.ones((1, 1, 3)))
  step, state, (pixels, labels), _ = linear(
    {"augment.name": "crop_flip"}, white
  )
  pixels = jnp.full_like(pixels, 255)
  _, reported, *_ = step(state, pixels, labels, jax.random.key(0))
  assert float(reported.sums["loss"]) == pytest.approx(4 * np.log(10), rel=1e-6)
