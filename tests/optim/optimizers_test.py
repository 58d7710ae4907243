import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base, he2015_depth20
from resnet_flax.optim import any_optax, optimizers


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
  ours = optimizers.create_optimizer(base.get_config().optimizer)
  expected = 1e-4 * np.sum(np.square(params["conv"]["kernel"]))
  np.testing.assert_allclose(ours.penalty(params), expected, rtol=1e-6)


def test_paper_decays_all_weights(params):
  ours = optimizers.create_optimizer(he2015_depth20.get_config().optimizer)
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
  ours = optimizers.create_optimizer(config)
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
  ours = optimizers.create_optimizer(config)
  state = ours.tx.init(params)
  grads = jax.tree.map(jnp.ones_like, params)
  for expected in (-0.1, -0.19):
    updates, state = ours.tx.update(grads, state, params, learning_rate=0.1)
    for update in jax.tree.leaves(updates):
      np.testing.assert_allclose(update, expected, rtol=1e-5)


@pytest.mark.parametrize(
  "name",
  [*optimizers.OPTIMIZERS, *any_optax.OPTIMIZERS, "optax/adafactor"],
)
def test_every_optimizer_descends(name):
  """An entry with the wrong sign would train uphill without any error."""
  config = base.get_config().optimizer
  config.name = name
  ours = optimizers.create_optimizer(config)
  weights = {"layer": {"kernel": jnp.full((1, 1, 2, 3), 2.0)}}
  state = ours.tx.init(weights)
  new, _ = ours.update(weights, state, weights, 0.1)  # The gradient of w²/2.
  assert jnp.all(jnp.abs(new["layer"]["kernel"]) < 2.0)


@pytest.mark.parametrize("recipe", [base, he2015_depth20])
def test_update_in_groups_is_the_chain(recipe):
  ours = optimizers.create_optimizer(recipe.get_config().optimizer)
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


def make(**values):
  config = base.get_config().optimizer
  config.update({"l2": 0.0} | values)
  return optimizers.create_optimizer(config)


def norm(tree):
  return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))


def test_the_norm_of_a_deep_networks_gradient_is_clipped_as_a_whole():
  ours = make(name="sgd", momentum=0.0, clip_norm=0.5)
  params = {f"module{k}": {"kernel": jnp.zeros(4)} for k in range(40)}
  state = ours.tx.init(params)
  for value, expected in ((3.0, 0.5), (1e-3, 1e-3 * np.sqrt(160))):
    grads = jax.tree.map(lambda w, value=value: w + value, params)
    new, _ = jax.jit(ours.update)(grads, state, params, 1.0)
    assert norm(new) == pytest.approx(expected, rel=1e-5)


def test_l2_is_clipped_and_weight_decay_is_not(params):
  grads = jax.tree.map(jnp.zeros_like, params)

  def update(**values):
    ours = make(name="sgd", momentum=0.0, clip_norm=1e-3, **values)
    state = ours.tx.init(params)
    return ours.tx.update(grads, state, params, learning_rate=1.0)[0]

  assert norm(update(l2=0.1)) == pytest.approx(1e-3, rel=1e-5)
  decayed = update(weight_decay=0.1)["conv"]["kernel"]
  np.testing.assert_allclose(
    decayed, -0.1 * params["conv"]["kernel"], rtol=1e-5
  )


def test_nesterov(params):
  """As PyTorch defines it: v = m v + g, w -= rate (g + m v)."""
  ours = make(name="sgd", momentum=0.8, nesterov=True)
  state = ours.tx.init(params)
  grads = jax.tree.map(jnp.ones_like, params)
  for expected in (-0.1 * 1.8, -0.1 * (1 + 0.8 * 1.8)):
    updates, state = ours.tx.update(grads, state, params, learning_rate=0.1)
    for update in jax.tree.leaves(updates):
      np.testing.assert_allclose(update, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("name", "l2_weights"),
  [
    *(("sgd", "kernels"), ("lamb", "kernels"), ("lion", "kernels")),
    *(("adamw", name) for name in optimizers.L2_WEIGHTS),
    *(("muon", name) for name in optimizers.L2_WEIGHTS),
  ],
)
def test_weight_decay_is_the_literatures(params, name, l2_weights):
  """Two steps by hand; for muon, only arrays that it leaves to Adam."""
  decay, rates = 0.3, (0.1, 0.05)
  ours = make(name=name, weight_decay=decay, l2_weights=l2_weights)
  assert ours.penalty(params) == 0
  flat = {k: np.asarray(v) for k, v in flatten(params).items()}
  m, v = ({k: np.zeros_like(w) for k, w in flat.items()} for _ in range(2))
  state = ours.tx.init(params)
  rng = np.random.default_rng(1)
  for step, rate in enumerate(rates, 1):
    grads = {k: rng.normal(size=w.shape) for k, w in flat.items()}
    tree = jax.tree.map(jnp.zeros_like, params)
    for (layer, kind), g in grads.items():
      tree[layer][kind] = jnp.asarray(g, jnp.float32)
    params, state = jax.jit(ours.update)(tree, state, params, rate)
    for k, w in flat.items():
      g, decays = grads[k], is_decayed(k, w, l2_weights)
      pull = decay * decays * w
      adam = {"adamw": 1e-8, "lamb": 1e-6, "muon": 1e-8}
      if name == "sgd":
        m[k] = 0.9 * m[k] + g + pull
        update = m[k]
      elif name == "lion":
        update = np.sign(0.9 * m[k] + 0.1 * g) + pull
        m[k] = 0.99 * m[k] + 0.01 * g
      else:
        m[k] = 0.9 * m[k] + 0.1 * g
        v[k] = 0.999 * v[k] + 0.001 * g**2
        hat = m[k] / (1 - 0.9**step), v[k] / (1 - 0.999**step)
        if name == "muon":  # Its Adam has Nesterov's momentum.
          first = 0.9 * m[k] / (1 - 0.9 ** (step + 1))
          hat = first + 0.1 * g / (1 - 0.9**step), hat[1]
        update = hat[0] / (np.sqrt(hat[1]) + adam[name]) + pull
        if name == "lamb":
          norms = np.linalg.norm(w), np.linalg.norm(update)
          update *= norms[0] / norms[1] if min(norms) else 1.0
      if name == "muon" and w.ndim == 4:
        flat[k] = np.asarray(flatten(params)[k])
      else:
        flat[k] = w - rate * update
      np.testing.assert_allclose(
        flatten(params)[k], flat[k], rtol=2e-4, atol=1e-5, err_msg=str(k)
      )


def flatten(params):
  return {
    (layer, kind): w for layer, of in params.items() for kind, w in of.items()
  }


def is_decayed(key, w, l2_weights):
  kinds = {"conv_kernels": w.ndim == 4, "kernels": key[1] == "kernel"}
  return kinds.get(l2_weights, True)


def test_muon_makes_convolution_kernels_orthogonal(params):
  """Newton and Schulz's five steps (Jordan 2024) on [H W inputs, outputs]."""
  decay = 0.2
  ours = make(name="muon", weight_decay=decay)
  grads = jax.tree.map(lambda w: jnp.cos(3 * w), params)
  state = ours.tx.init(params)
  new, _ = jax.jit(ours.update)(grads, state, params, 0.1)
  w, g = (np.asarray(t["conv"]["kernel"], np.float64) for t in (params, grads))
  x = g.reshape(18, 4).T
  x /= np.linalg.norm(x)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
  assert np.all(np.abs(np.linalg.svd(x)[1] - 1) < 0.5)
  # By default Optax scales by the root of outputs over inputs, from 1 on.
  expected = w - 0.1 * (x.T.reshape(w.shape) + decay * w)
  np.testing.assert_allclose(new["conv"]["kernel"], expected, atol=2e-3)


@pytest.mark.parametrize(
  "name",
  [
    "adam",
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ("sgd", "adamw", "lamb", "lion")
    ),
  ],
)
def test_groups_of_arrays_are_the_chain_when_steps_are_accumulated(name):
  ours = make(name=name, accumulate_steps=2, weight_decay=0.1)
  rng = np.random.default_rng(0)
  params, *of_steps = (
    {
      f"module{k}": {"kernel": jnp.asarray(rng.normal(size=4), jnp.float32)}
      for k in range(20)
    }
    for _ in range(5)
  )
  state, once = ours.tx.init(params), make(name=name, weight_decay=0.1)
  expected, once_state = params, once.tx.init(params)
  for step, grads in enumerate(of_steps):
    before = params
    params, state = jax.jit(ours.update)(grads, state, params, 0.1)
    if step % 2 == 0:
      jax.tree.map(np.testing.assert_array_equal, params, before)
      continue
    mean = jax.tree.map(lambda a, b: (a + b) / 2, of_steps[step - 1], grads)
    expected, once_state = once.update(mean, once_state, expected, 0.1)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      params,
      expected,
    )
