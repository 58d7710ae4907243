import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base, he2015_depth20
from resnet_flax import optimizer
from resnet_flax.run import errors


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
  ours = optimizer.create_optimizer(base.get_config().optimizer)
  expected = 1e-4 * np.sum(np.square(params["conv"]["kernel"]))
  np.testing.assert_allclose(ours.penalty(params), expected, rtol=1e-6)


def test_paper_decays_all_weights(params):
  ours = optimizer.create_optimizer(he2015_depth20.get_config().optimizer)
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
  ours = optimizer.create_optimizer(config)
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
  ours = optimizer.create_optimizer(config)
  state = ours.tx.init(params)
  grads = jax.tree.map(jnp.ones_like, params)
  for expected in (-0.1, -0.19):
    updates, state = ours.tx.update(grads, state, params, learning_rate=0.1)
    for update in jax.tree.leaves(updates):
      np.testing.assert_allclose(update, expected, rtol=1e-5)


@pytest.mark.parametrize("recipe", [base, he2015_depth20])
def test_update_in_groups_is_the_chain(recipe):
  ours = optimizer.create_optimizer(recipe.get_config().optimizer)
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


def test_unknown_names_are_errors():
  config = base.get_config().optimizer
  config.name = "adamw"
  with pytest.raises(errors.ConfigError, match="Did you mean 'adam'"):
    optimizer.create_optimizer(config)
  config.l2_weights = "kernel"
  with pytest.raises(errors.ConfigError, match="Did you mean 'kernels'"):
    optimizer.create_optimizer(config)
