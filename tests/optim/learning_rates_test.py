import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from resnet_flax.optim import learning_rates, schedules

KERAS = (40, 60, 80, 90)


@pytest.mark.parametrize(
  ("num_epochs", "expected"),
  [(200, (81, 121, 161, 181)), (20, (9, 13, 17, 19)), (1, (1, 1, 1, 1))],
)
def test_keras_drops(num_epochs, expected):
  assert learning_rates.drop_epochs(num_epochs, KERAS, False) == expected


def test_paper_drops():
  assert learning_rates.drop_epochs(164, (50, 75), True) == (82, 123)


def keras_rate(epoch):
  """The example's lr_schedule, as facts about 200 epochs."""
  for after, factor in ((180, 0.5e-3), (160, 1e-3), (120, 1e-2), (80, 1e-1)):
    if epoch > after:
      return 1e-3 * factor
  return 1e-3


def test_rate_of_every_epoch():
  rate = learning_rates.create_learning_rate(
    base.get_config(), steps_per_epoch=3
  )
  state = rate.rules.init()
  for epoch in range(200):
    for step in (3 * epoch, 3 * epoch + 2):
      value = float(rate(jnp.asarray(step), state))
      assert value == pytest.approx(keras_rate(epoch), rel=1e-6)


def test_short_run_takes_the_later_of_two_drops_at_one_epoch():
  config = base.get_config()
  config.num_epochs = 3
  rate = learning_rates.create_learning_rate(config, steps_per_epoch=1)
  values = [float(rate(jnp.asarray(e), rate.rules.init())) for e in range(3)]
  np.testing.assert_allclose(values, [1e-3, 1e-3, 1e-5], rtol=1e-6)


def rates(config, steps_per_epoch):
  rate = learning_rates.create_learning_rate(config, steps_per_epoch)
  steps = jnp.arange(config.num_epochs * steps_per_epoch + 1)
  return np.array([float(rate(step, rate.rules.init())) for step in steps])


def test_half_a_cosine_ends_at_zero():
  config = base.get_config()
  config.num_epochs = 10
  config.schedule.name = "cosine"
  config.optimizer.learning_rate = 2.0
  angles = np.linspace(0, np.pi, 41)
  np.testing.assert_allclose(rates(config, 4), 1 + np.cos(angles), atol=1e-6)


@pytest.mark.parametrize(
  "name", [n for n in learning_rates.SCHEDULES if n != "onecycle"]
)
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
  if name == "warmup_stable_decay":
    np.testing.assert_allclose(found[11:33], 2.0, rtol=1e-6)
    np.testing.assert_allclose(found[32:], np.linspace(2, 0, 9), atol=1e-6)
  if name == "constant":
    np.testing.assert_allclose(found[11:], 2.0, rtol=1e-6)
  if name == "drops":
    # Drops stay where they are: the first is at epoch 5.
    np.testing.assert_allclose(found[10:20], 2.0, rtol=1e-6)
    assert found[20] == pytest.approx(0.2)


@pytest.mark.parametrize("name", learning_rates.SCHEDULES)
def test_open_epochs_do_not_depend_on_how_many_come(name):
  config = base.get_config()
  config.schedule.name = name
  config.schedule.drop_percents = (1, 2, 3, 4)
  config.num_epochs = 10
  flat = {"schedule.name": name, "schedule.decay_percent": 20, "num_epochs": 10}
  open_epochs = min(schedules.open_epochs(flat), 10)
  assert open_epochs == {"constant": 10, "warmup_stable_decay": 8}.get(name, 0)
  short = rates(config, 4)
  config.num_epochs = 20
  same = short == rates(config, 4)[: len(short)]
  assert same[: 4 * open_epochs].all()
  # The first rate that follows is that of a step after the epoch begins.
  assert (
    name in ("constant", "drops") or not same[4 * open_epochs + 1 : -1].any()
  )


@pytest.mark.parametrize(("percent", "peak"), [(30, 12), (1, 0), (99, 39)])
def test_one_cycle_is_a_triangle(percent, peak):
  config = base.get_config()
  config.num_epochs = 10
  config.schedule.name = "onecycle"
  config.schedule.peak_percent = percent
  config.optimizer.learning_rate = 2.0
  expected = np.interp(np.arange(41), [0, peak, 40], [0, 2, 0])
  if not peak:
    expected[0] = 2.0
  np.testing.assert_allclose(rates(config, 4), expected, atol=1e-6)


def test_describe_names_the_cosine_and_its_warm_up():
  config = base.get_config()
  config.schedule.name = "cosine"
  config.schedule.linear_warmup_epochs = 5.0
  assert learning_rates.create_learning_rate(config, 1).describe() == [
    "warm-up: from 0 in 5 epochs",
    "epoch 5: 0.001, by half a cosine to 0 at epoch 200",
  ]


@pytest.mark.parametrize(
  ("name", "lines"),
  [
    (
      "onecycle",
      ["epoch 0: 0, linearly to 0.001 at epoch 60, linearly to 0 at epoch 200"],
    ),
    (
      "warmup_stable_decay",
      ["epoch 0: 0.001", "epoch 160: 0.001, linearly to 0 at epoch 200"],
    ),
  ],
)
def test_describe_lists_corners(name, lines):
  config = base.get_config()
  config.schedule.name = name
  assert learning_rates.create_learning_rate(config, 10).describe() == lines
