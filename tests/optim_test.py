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


class KerasPlateau:
  """ReduceLROnPlateau as Keras documents it, on a rate of its own."""

  def __init__(self, rate, factor, patience, cooldown, min_delta, min_lr):
    self.rate, self.factor, self.patience = rate, factor, patience
    self.cooldown, self.min_delta, self.min_lr = cooldown, min_delta, min_lr
    self.best, self.wait, self.cooling = np.inf, 0, 0

  def on_epoch_end(self, loss):
    if self.cooling > 0:
      self.cooling -= 1
      self.wait = 0
    if loss < self.best - self.min_delta:
      self.best, self.wait = loss, 0
    elif self.cooling <= 0:
      self.wait += 1
      if self.wait >= self.patience:
        self.rate = max(self.rate * self.factor, self.min_lr)
        self.cooling, self.wait = self.cooldown, 0


def plateau_config():
  config = base.get_config()
  config.schedule.drop_percents = ()
  config.schedule.drop_factors = ()
  config.plateau.enabled = True
  config.plateau.min_lr = 5e-5
  return config


def test_plateau_is_keras_rule():
  config = plateau_config()
  plateau = config.plateau
  theirs = KerasPlateau(
    1e-3,
    plateau.factor,
    plateau.patience,
    plateau.cooldown,
    plateau.min_delta,
    plateau.min_lr,
  )
  ours = optim.create_learning_rate(config, steps_per_epoch=1)
  state = ours.init()
  rng = np.random.default_rng(0)
  losses = np.concatenate([[2, 1.5, 1.2, 1.1], 1.1 + rng.normal(0, 0.05, 40)])
  rates = set()
  for epoch, loss in enumerate(losses):
    rate = float(ours(jnp.asarray(epoch), state))
    assert rate == pytest.approx(theirs.rate, rel=1e-5), epoch
    rates.add(round(rate, 9))
    state = ours.after_epoch(state, loss)
    theirs.on_epoch_end(loss)
  # It fell more than once, and stopped at the floor.
  assert len(rates) >= 3
  assert min(rates) == pytest.approx(5e-5, rel=1e-5)


def test_plateau_multiplies_the_schedule():
  config = plateau_config()
  config.num_epochs = 20
  config.schedule.drop_percents = (50,)
  config.schedule.drop_factors = (0.1,)
  rate = optim.create_learning_rate(config, steps_per_epoch=1)
  state = rate.init()
  for loss in [1.0] * 6:
    state = rate.after_epoch(state, loss)
  assert float(rate(jnp.asarray(6), state)) == pytest.approx(10**-3.5)
  # Multiplied it would be 3.2e-5, under the floor of 5e-5.
  assert float(rate(jnp.asarray(15), state)) == pytest.approx(5e-5)


def test_floor_does_not_raise_the_schedules_own_rate():
  config = plateau_config()
  config.plateau.min_lr = 1.0
  rate = optim.create_learning_rate(config, steps_per_epoch=1)
  assert float(rate(jnp.asarray(0), rate.init())) == pytest.approx(1e-3)


def test_warm_up_ends_for_good_when_the_error_has_fallen():
  config = he2015_depth20.get_config()
  config.model.depth = 110
  rate = optim.create_learning_rate(config, steps_per_epoch=10**6)
  state = rate.init()

  def value():
    return float(rate(jnp.asarray(0), state))

  for _ in range(100):
    state = rate.after_step(state, jnp.asarray(0.9))
    assert value() == pytest.approx(0.01)
  steps = 0
  while value() == pytest.approx(0.01):
    state = rate.after_step(state, jnp.asarray(0.7))
    steps += 1
  # From 0.9 to under 0.8 towards 0.7, with about 50 steps of memory.
  assert 30 < steps < 60
  for _ in range(100):
    state = rate.after_step(state, jnp.asarray(1.0))
    assert value() == pytest.approx(0.1)


def test_no_warm_up_below_its_depth():
  config = he2015_depth20.get_config()
  rate = optim.create_learning_rate(config, steps_per_epoch=390)
  assert rate.warmup is None
  assert float(rate(jnp.asarray(0), rate.init())) == pytest.approx(0.1)


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
  else:
    # Drops stay where they are: the first is at epoch 5.
    np.testing.assert_allclose(found[10:20], 2.0, rtol=1e-6)
    assert found[20] == pytest.approx(0.2)


def test_describe_names_the_cosine_and_its_warm_up():
  config = base.get_config()
  config.schedule.name = "cosine"
  config.schedule.linear_warmup_epochs = 5.0
  assert optim.create_learning_rate(config, 1).describe() == [
    "warm-up: from 0 in 5 epochs",
    "epoch 0: 0.001, by half a cosine to 0 at epoch 200",
  ]


def test_describe_names_every_rule():
  config = plateau_config()
  config.schedule.warmup_learning_rate = 1e-4
  config.model.depth = 110
  text = "\n".join(
    optim.create_learning_rate(config, steps_per_epoch=1).describe()
  )
  assert "epoch 0: 0.001" in text
  assert "warm-up: 0.0001" in text
  assert "plateau: x 0.3162" in text
