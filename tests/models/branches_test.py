"""Squeeze-and-excitation and stochastic depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from resnet_flax.models import blocks, branches, registry


def branch(ratio, rate, *, train):
  return branches.Branch(ratio, rate, nn.Dense, train=train)


def images(channels=6):
  x = np.random.default_rng(0).normal(size=(3, 5, 5, channels))
  return jnp.asarray(x, jnp.float32)


def test_squeeze_and_excitation_is_hu_et_als_formula():
  """Equations 2 and 3, in a loop over images."""
  module = branch(2, 0.0, train=True)
  variables = module.init(jax.random.key(0), images(), blocks.Context())
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), variables["params"]
  )
  assert params["squeeze"]["kernel"].shape == (6, 3)
  expected = []
  for image in np.asarray(images()):
    z = image.mean((0, 1))
    hidden = z @ params["squeeze"]["kernel"] + params["squeeze"]["bias"]
    s = np.maximum(hidden, 0) @ params["excite"]["kernel"]
    s = 1 / (1 + np.exp(-s - params["excite"]["bias"]))
    expected.append(image * s)
  found = module.apply({"params": params}, images(), blocks.Context())
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_stochastic_depth_drops_by_the_linear_rule():
  """Block l of L stays with 1 - l / L * (1 - p_L), for the whole batch."""
  train, evaluate = (branch(0, 0.5, train=train) for train in (True, False))
  keys = jax.random.split(jax.random.key(0), 4000)
  for fraction in (0.25, 1.0):
    survival = 1 - fraction * 0.5
    apply = jax.vmap(
      lambda key: train.apply({}, images(), blocks.Context(key, fraction))  # noqa: B023
    )
    found = np.asarray(apply(keys)).reshape(len(keys), -1)
    stays = (found == np.asarray(images()).ravel()).all(1)
    assert (stays | (found == 0).all(1)).all()
    error = 4 * np.sqrt(survival * (1 - survival) / len(keys))
    assert abs(stays.mean() - survival) < error
    scaled = evaluate.apply({}, images(), blocks.Context(None, fraction))
    np.testing.assert_allclose(scaled, survival * images(), rtol=1e-6)


SQUEEZE = {"squeeze_excitation": 2}
DROP = {"stochastic_depth": 0.5}


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("resnet_v1", SQUEEZE | DROP),
    pytest.param(
      "wide_resnet",
      DROP | {"block_dropout": 0.3, "widen_factor": 1},
      marks=pytest.mark.slow,
    ),
    pytest.param("resnet_v2", DROP, marks=pytest.mark.slow),
    pytest.param("highway", SQUEEZE, marks=pytest.mark.slow),
    pytest.param("resnext", SQUEEZE | {"groups": 2}, marks=pytest.mark.slow),
    pytest.param(
      "preact",
      DROP | {"norm": "group_norm", "weight_standardization": True},
      marks=pytest.mark.slow,
    ),
  ],
)
def test_loops_change_nothing(name, changes):
  """The same draws, gradients and variables with and without loops."""
  config = base.get_config().model
  per_block, besides = {"resnet_v2": (9, 2), "resnext": (9, 2)}.get(
    name, (6, 4 if name == "wide_resnet" else 2)
  )
  config.update(
    {"name": name, "depth": 3 * per_block + besides, "num_filters": 4}
  )
  config.update(changes)

  def gradients(**switches):
    config.update(switches)
    model = registry.create_model(config, 10)
    model = model.clone(
      stage_sizes=(3, 1), stage_filters=model.stage_filters[:2]
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)))
    variables = model.lazy_init(jax.random.key(0), x, train=False)
    assert ("branch" in variables["params"]["stage1_block1"]) == (
      "squeeze_excitation" in changes
    )

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradients(params, key):
      logits, _ = model.apply(
        variables | {"params": params},
        x,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": key},
      )
      return jnp.mean(jnp.square(logits))

    keys = jax.random.split(jax.random.key(3), 8)
    of_keys = (loss_and_gradients(variables["params"], key) for key in keys)
    losses, gradients = zip(*of_keys, strict=True)
    return losses, gradients[0]

  losses, plain = gradients()
  draws = "stochastic_depth" in changes
  assert (len({float(x) for x in losses}) > 1) == draws
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
    gradients(scan=True, remat=True),
    (losses, plain),
  )


def test_blocks_are_numbered_from_one_over_all_stages():
  config = base.get_config().model
  config.update({"depth": 8, "stochastic_depth": 0.5})
  contexts = registry.create_model(config, 10)._contexts(train=False)
  np.testing.assert_allclose(contexts.fraction, [1 / 3, 2 / 3, 1])
