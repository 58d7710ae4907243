import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, he2015_depth20
from resnet_flax.optim import learning_rates


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
  ours = learning_rates.create_learning_rate(config, steps_per_epoch=1)
  state = ours.rules.init()
  rng = np.random.default_rng(0)
  losses = np.concatenate([[2, 1.5, 1.2, 1.1], 1.1 + rng.normal(0, 0.05, 40)])
  rates = set()
  for epoch, loss in enumerate(losses):
    rate = float(ours(jnp.asarray(epoch), state))
    assert rate == pytest.approx(theirs.rate, rel=1e-5), epoch
    rates.add(round(rate, 9))
    state = ours.rules.after_epoch(state, loss)
    theirs.on_epoch_end(loss)
  # It fell more than once, and stopped at the floor.
  assert len(rates) >= 3
  assert min(rates) == pytest.approx(5e-5, rel=1e-5)


def test_plateau_multiplies_the_schedule():
  config = plateau_config()
  config.num_epochs = 20
  config.schedule.drop_percents = (50,)
  config.schedule.drop_factors = (0.1,)
  rate = learning_rates.create_learning_rate(config, steps_per_epoch=1)
  state = rate.rules.init()
  for loss in [1.0] * 6:
    state = rate.rules.after_epoch(state, loss)
  assert float(rate(jnp.asarray(6), state)) == pytest.approx(10**-3.5)
  # Multiplied it would be 3.2e-5, under the floor of 5e-5.
  assert float(rate(jnp.asarray(15), state)) == pytest.approx(5e-5)


def test_floor_does_not_raise_the_schedules_own_rate():
  config = plateau_config()
  config.plateau.min_lr = 1.0
  rate = learning_rates.create_learning_rate(config, steps_per_epoch=1)
  assert float(rate(jnp.asarray(0), rate.rules.init())) == pytest.approx(1e-3)


def test_warm_up_ends_for_good_when_the_error_has_fallen():
  config = he2015_depth20.get_config()
  config.model.depth = 110
  rate = learning_rates.create_learning_rate(config, steps_per_epoch=10**6)
  state = rate.rules.init()

  def value():
    return float(rate(jnp.asarray(0), state))

  for _ in range(100):
    state = rate.rules.after_step(state, jnp.asarray(0.9))
    assert value() == pytest.approx(0.01)
  steps = 0
  while value() == pytest.approx(0.01):
    state = rate.rules.after_step(state, jnp.asarray(0.7))
    steps += 1
  # From 0.9 to under 0.8 towards 0.7, with about 50 steps of memory.
  assert 30 < steps < 60
  for _ in range(100):
    state = rate.rules.after_step(state, jnp.asarray(1.0))
    assert value() == pytest.approx(0.1)


def test_no_warm_up_below_its_depth():
  config = he2015_depth20.get_config()
  rate = learning_rates.create_learning_rate(config, steps_per_epoch=390)
  assert not rate.rules
  assert float(rate(jnp.asarray(0), rate.rules.init())) == pytest.approx(0.1)


def test_describe_names_every_rule():
  config = plateau_config()
  config.schedule.warmup_learning_rate = 1e-4
  config.model.depth = 110
  text = "\n".join(
    learning_rates.create_learning_rate(config, steps_per_epoch=1).describe()
  )
  assert "epoch 0: 0.001" in text
  assert "warm-up: 0.0001" in text
  assert "plateau: x 0.3162" in text
