import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base, he2015_depth20
from resnet_flax import optim


@pytest.fixture
def params():
  rng = np.random.default_rng(0)
  return {
    "conv": {
      "kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32),
      "bias": jnp.asarray(rng.normal(size=4), jnp.float32),
    },
    "bn": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
    "head": {"kernel": jnp.asarray(rng.normal(size=(4, 10)), jnp.float32)},
  }


def test_penalty_takes_convolution_kernels_only(params):
  ours = optim.create_optimizer(base.get_config().optimizer)
  expected = 1e-4 * np.sum(np.square(params["conv"]["kernel"]))
  np.testing.assert_allclose(ours.penalty(params), expected, rtol=1e-6)


def test_paper_decays_all_weights(params):
  ours = optim.create_optimizer(he2015_depth20.get_config().optimizer)
  # The gradient of the penalty is the paper's 1e-4 * w.
  grads = jax.grad(ours.penalty)(params)
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, 1e-4 * w, rtol=1e-5),
    grads,
    params,
  )


def test_chain_adds_the_gradient_of_the_penalty(params):
  """Two steps of Adam by hand, with L2 going through the moments."""
  config = base.get_config().optimizer
  config.l2 = 0.1
  ours = optim.create_optimizer(config)
  state = ours.tx.init(params)
  rng = np.random.default_rng(1)
  m = jax.tree.map(np.zeros_like, params)
  v = jax.tree.map(np.zeros_like, params)
  for step in (1, 2):
    grads = jax.tree.map(lambda w: rng.normal(size=w.shape) * 1.0, params)
    rate = 0.01 * step
    updates, state = ours.tx.update(
      jax.tree.map(jnp.asarray, grads), state, params, learning_rate=rate
    )
    decay = jax.grad(ours.penalty)(params)
    total = jax.tree.map(lambda g, d: g + np.asarray(d), grads, decay)
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, total)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, total)
    expected = jax.tree.map(
      lambda m, v, step=step, rate=rate: (
        -rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-7)
      ),
      m,
      v,
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8),
      updates,
      expected,
    )


def test_sgd_is_heavy_ball(params):
  config = he2015_depth20.get_config().optimizer
  config.l2 = 0.0
  ours = optim.create_optimizer(config)
  state = ours.tx.init(params)
  grads = jax.tree.map(jnp.ones_like, params)
  for expected in (-0.1, -0.19):
    updates, state = ours.tx.update(grads, state, params, learning_rate=0.1)
    for update in jax.tree.leaves(updates):
      np.testing.assert_allclose(update, expected, rtol=1e-5)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_descends(name):
  """An entry with the wrong sign would train uphill without any error."""
  config = base.get_config().optimizer
  config.name = name
  ours = optim.create_optimizer(config)
  weights = {"layer": {"kernel": jnp.full((1, 1, 2, 3), 2.0)}}
  state = ours.tx.init(weights)
  new, _ = ours.update(weights, state, weights, 0.1)  # The gradient of w²/2.
  assert jnp.all(jnp.abs(new["layer"]["kernel"]) < 2.0)


@pytest.mark.parametrize("recipe", [base, he2015_depth20])
def test_update_in_groups_is_the_chain(recipe):
  ours = optim.create_optimizer(recipe.get_config().optimizer)
  rng = np.random.default_rng(0)
  params, grads = (
    {
      f"module{k}": {
        "kernel": jnp.asarray(rng.normal(size=(1, 1, 2, 3)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=3), jnp.float32),
      }
      for k in range(40)
    }
    for _ in range(2)
  )
  state = ours.tx.init(params)
  update = jax.jit(ours.update)
  for _ in range(2):
    updates, expected_state = ours.tx.update(
      grads, state, params, learning_rate=0.1
    )
    expected = optax.apply_updates(params, updates), expected_state
    params, state = update(grads, state, params, 0.1)
    assert jax.tree.structure((params, state)) == jax.tree.structure(expected)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      (params, state),
      expected,
    )


def test_a_transformation_that_looks_at_all_arrays_sees_all():
  """The norm of a deep network's gradient is clipped as a whole."""
  ours = optim.create_optimizer(he2015_depth20.get_config().optimizer)
  clip = optax.clip_by_global_norm(1.0)
  ours = dataclasses.replace(
    ours,
    tx=optax.with_extra_args_support(optax.chain(clip, ours.tx)),
    links=("clip_by_global_norm(1)", *ours.links),
    l2=0.0,
  )
  params = {f"module{k}": {"kernel": jnp.zeros(4)} for k in range(40)}
  grads = jax.tree.map(jnp.ones_like, params)
  new, _ = jax.jit(ours.update)(grads, ours.tx.init(params), params, 1.0)
  norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(new)))
  assert norm == pytest.approx(1.0, rel=1e-5)


KERAS = (40, 60, 80, 90)


@pytest.mark.parametrize(
  ("num_epochs", "expected"),
  [(200, (81, 121, 161, 181)), (20, (9, 13, 17, 19)), (1, (1, 1, 1, 1))],
)
def test_keras_drops(num_epochs, expected):
  assert optim.drop_epochs(num_epochs, KERAS, False) == expected


def test_paper_drops():
  assert optim.drop_epochs(164, (50, 75), True) == (82, 123)


def keras_rate(epoch):
  """The example's lr_schedule, as facts about 200 epochs."""
  for after, factor in ((180, 0.5e-3), (160, 1e-3), (120, 1e-2), (80, 1e-1)):
    if epoch > after:
      return 1e-3 * factor
  return 1e-3


def test_rate_of_every_epoch():
  rate = optim.create_learning_rate(base.get_config(), steps_per_epoch=3)
  state = rate.init()
  for epoch in range(200):
    for step in (3 * epoch, 3 * epoch + 2):
      value = float(rate(jnp.asarray(step), state))
      assert value == pytest.approx(keras_rate(epoch), rel=1e-6)


def test_short_run_takes_the_later_of_two_drops_at_one_epoch():
  config = base.get_config()
  config.num_epochs = 3
  rate = optim.create_learning_rate(config, steps_per_epoch=1)
  values = [float(rate(jnp.asarray(e), rate.init())) for e in range(3)]
  np.testing.assert_allclose(values, [1e-3, 1e-3, 1e-5], rtol=1e-6)


def rates(config, steps_per_epoch):
  rate = optim.create_learning_rate(config, steps_per_epoch)
  steps = jnp.arange(config.num_epochs * steps_per_epoch + 1)
  return np.array([float(rate(step, rate.init())) for step in steps])


def test_half_a_cosine_ends_at_zero():
  config = base.get_config()
  config.num_epochs = 10
  config.schedule.name = "cosine"
  config.optimizer.learning_rate = 2.0
  angles = np.linspace(0, np.pi, 41)
  np.testing.assert_allclose(rates(config, 4), 1 + np.cos(angles), atol=1e-6)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_the_rate_rises_in_equal_steps_before_that(name):
  config = base.get_config()
  config.num_epochs = 10
  config.schedule.name = name
  config.schedule.linear_warmup_epochs = 2.5
  config.optimizer.learning_rate = 2.0
  found = rates(config, 4)
  np.testing.assert_allclose(found[:11], np.linspace(0, 2, 11), rtol=1e-6)
  if name == "cosine":
    after = 1 + np.cos(np.linspace(0, np.pi, 31))
    np.testing.assert_allclose(found[10:], after, atol=1e-6)
  if name == "constant":
    np.testing.assert_allclose(found[11:], 2.0, rtol=1e-6)
  if name == "drops":
    # Drops stay where they are: the first is at epoch 5.
    np.testing.assert_allclose(found[10:20], 2.0, rtol=1e-6)
    assert found[20] == pytest.approx(0.2)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_open_ended_schedules_do_not_depend_on_the_epochs(name):
  config = base.get_config()
  config.schedule.name = name
  config.num_epochs = 10
  short = rates(config, 4)
  config.num_epochs = 20
  same = np.array_equal(short, rates(config, 4)[: len(short)])
  assert same == (name in optim.OPEN_ENDED)


def test_describe_names_the_cosine_and_its_warm_up():
  config = base.get_config()
  config.schedule.name = "cosine"
  config.schedule.linear_warmup_epochs = 5.0
  assert optim.create_learning_rate(config, 1).describe() == [
    "warm-up: from 0 in 5 epochs",
    "epoch 0: 0.001, by half a cosine to 0 at epoch 200",
  ]
