import functools
import operator
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.models.kernels import batch_norm
from resnet_flax.parallel import mesh as mesh_lib, transfer
from tests.models.flax_batch_norm import FlaxBatchNorm

SHAPE = (6, 5, 4, 3)


flax_batch_norm, our_batch_norm = (
  functools.partial(cls, momentum=0.9, epsilon=1e-3)
  for cls in (FlaxBatchNorm, batch_norm.BatchNorm)
)


def arrays(dtype=np.float32):
  rng = np.random.default_rng(0)
  x = rng.normal(1.5, 2, SHAPE).astype(dtype)
  residual, g = rng.normal(size=(2, *SHAPE)).astype(dtype)
  params = {
    "scale": rng.normal(1, 0.3, 3).astype(np.float32),
    "bias": rng.normal(0, 0.3, 3).astype(np.float32),
  }
  stats = {
    "mean": rng.normal(size=3).astype(np.float32),
    "var": rng.uniform(0.5, 2, 3).astype(np.float32),
  }
  return x, residual, g, params, stats


def outcome(module, x, residual, g, params, stats):
  """Results, new statistics and all gradients of a training call."""

  def call(params, x, residual):
    return module.apply(
      {"params": params, "batch_stats": stats},
      x,
      residual,
      mutable=["batch_stats"],
    )

  y, vjp, updated = jax.vjp(call, params, x, residual, has_aux=True)
  return y, updated, vjp(g)


def assert_close(a, b, tolerance=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a, np.float64),
      np.asarray(b, np.float64),
      rtol=tolerance,
      atol=tolerance,
    ),
    a,
    b,
  )


@pytest.mark.parametrize("act", [None, nn.relu, nn.silu])
@pytest.mark.parametrize("with_residual", [False, True])
def test_equals_flax_in_training(act, with_residual):
  x, residual, g, params, stats = arrays()
  residual = residual if with_residual else None
  ours, flaxs = (
    outcome(cls(False, act=act), x, residual, g, params, stats)
    for cls in (our_batch_norm, flax_batch_norm)
  )
  assert_close(ours, flaxs)


@pytest.mark.parametrize("with_residual", [False, True])
def test_equals_flax_in_inference(with_residual):
  x, residual, _, params, stats = arrays()
  residual = residual if with_residual else None
  variables = {"params": params, "batch_stats": stats}
  ours, flaxs = (
    cls(True, act=nn.relu).apply(variables, x, residual)
    for cls in (our_batch_norm, flax_batch_norm)
  )
  assert_close(ours, flaxs)


def test_has_flax_variables_and_does_not_update_them_at_initialisation():
  x, *_ = arrays()
  ours, flaxs = (
    cls(False).init(jax.random.key(0), x)
    for cls in (our_batch_norm, flax_batch_norm)
  )
  assert_close(ours, flaxs)
  dtypes = jax.tree.map(lambda leaf: leaf.dtype, ours)
  assert set(jax.tree.leaves(dtypes)) == {jnp.dtype("float32")}


def test_bfloat16_equals_flax_and_keeps_float32_statistics():
  x, residual, g, params, stats = arrays(jnp.bfloat16)
  ours, flaxs = (
    outcome(
      cls(False, act=nn.relu, dtype=jnp.bfloat16), x, residual, g, params, stats
    )
    for cls in (our_batch_norm, flax_batch_norm)
  )
  assert ours[0].dtype == jnp.bfloat16
  assert ours[1]["batch_stats"]["mean"].dtype == jnp.float32
  assert_close(ours[:2], flaxs[:2])
  assert_close(ours[2], flaxs[2], tolerance=2e-2)


def test_second_derivatives_equal_flax():
  x, residual, g, params, stats = arrays()
  g = jnp.asarray(g)

  def gradient_norm(module, x):
    def loss(x):
      y, _ = module.apply(
        {"params": params, "batch_stats": stats},
        x,
        residual,
        mutable=["batch_stats"],
      )
      return jnp.sum(y * g)

    return jnp.sum(jax.grad(loss)(x) ** 2)

  ours, flaxs = (
    jax.grad(functools.partial(gradient_norm, cls(False, act=nn.silu)))(x)
    for cls in (our_batch_norm, flax_batch_norm)
  )
  assert_close(ours, flaxs, tolerance=1e-4)


def test_statistics_have_derivatives():
  x, _, _, params, stats = arrays()

  def variance(module, x):
    variables = {"params": params, "batch_stats": stats}
    _, updated = module.apply(variables, x, mutable=["batch_stats"])
    updated = updated["batch_stats"]
    return jnp.sum(updated["var"] + 3 * updated["mean"])

  ours, flaxs = (
    jax.grad(functools.partial(variance, cls(False)))(x)
    for cls in (our_batch_norm, flax_batch_norm)
  )
  assert_close(ours, flaxs)


@pytest.mark.parametrize("with_residual", [False, True])
def test_groups_are_batches_of_their_own(with_residual):
  """By Flax's, one part after the other."""
  x, residual, g, params, stats = arrays()
  x[:2] += 1  # So that the parts differ.
  residual = residual if with_residual else None
  y, updated, (g_params, g_x, g_residual) = outcome(
    our_batch_norm(False, act=nn.relu, groups=3), x, residual, g, params, stats
  )
  parts = [
    outcome(
      flax_batch_norm(False, act=nn.relu),
      x[k : k + 2],
      residual[k : k + 2] if with_residual else None,
      g[k : k + 2],
      params,
      stats,
    )
    for k in (0, 2, 4)
  ]
  assert_close(y, np.concatenate([part[0] for part in parts]))
  mean = functools.partial(jax.tree.map, lambda *each: np.mean(each, axis=0))
  assert_close(updated, mean(*(part[1] for part in parts)))
  total = functools.partial(jax.tree.map, lambda *each: np.sum(each, axis=0))
  assert_close(g_params, total(*(part[2][0] for part in parts)))
  assert_close(g_x, np.concatenate([part[2][1] for part in parts]))
  if with_residual:
    of_parts = [part[2][2] for part in parts]
    assert_close(g_residual, np.concatenate(of_parts))


def test_groups_on_devices_of_their_own_are_not_sent():
  x, residual, g, params, stats = arrays()
  tile = functools.partial(np.tile, reps=(4, 1, 1, 1))
  x, residual, g = tile(x), tile(residual), tile(g)
  x[:3] += 1
  module = our_batch_norm(False, act=nn.relu, groups=8)
  call = jax.jit(functools.partial(outcome, module))
  sharding = mesh_lib.sharding(mesh_lib.create_mesh(), mesh_lib.DATA)
  sharded = transfer.put((x, residual, g), sharding)
  assert_close(
    call(*sharded, params, stats), call(x, residual, g, params, stats)
  )
  # Without what updates the running statistics and the parameters.
  through = jax.jit(
    lambda *arguments: (lambda y, _, gradients: (y, gradients[1:]))(
      *outcome(module, *arguments, params, stats)
    )
  )
  text = through.lower(*sharded).compile().as_text()
  assert not re.search("all-reduce|all-gather|collective-permute", text)


def test_vmap_equals_a_loop():
  x, residual, g, params, stats = arrays()
  call = functools.partial(outcome, our_batch_norm(False, act=nn.relu))
  stack = functools.partial(jax.tree.map, lambda a: np.stack([a, a * 0.5]))
  stacked = stack((x, residual, g, params, stats))
  together = jax.vmap(call)(*stacked)
  for k in range(2):
    pick = functools.partial(jax.tree.map, operator.itemgetter(k))
    assert_close(pick(together), call(*pick(stacked)))


def test_statistics_are_those_of_a_batch_sharded_over_devices():
  x, residual, g, params, stats = arrays()
  tile = functools.partial(np.tile, reps=(4, 1, 1, 1))
  x, residual, g = tile(x), tile(residual), tile(g)
  x[:3] += 1  # So that devices' own statistics would differ.
  call = jax.jit(functools.partial(outcome, our_batch_norm(False, act=nn.relu)))
  expected = call(x, residual, g, params, stats)
  mesh = mesh_lib.create_mesh()
  assert mesh.size == 8
  sharded = transfer.put(
    (x, residual, g), mesh_lib.sharding(mesh, mesh_lib.DATA)
  )
  assert_close(call(*sharded, params, stats), expected)
  text = call.lower(*sharded, params, stats).compile().as_text()
  assert "all-gather" not in text


@pytest.mark.parametrize("act", [None, nn.relu])
@pytest.mark.parametrize("train", [False, True])
def test_without_batch_norm(act, train):
  """The residual sum and the activation stay; there is nothing to learn."""
  x, residual, *_ = arrays()
  module = batch_norm.NoNorm(use_running_average=not train, act=act)
  assert module.init(jax.random.key(0), x, residual) == {}
  for other in (None, residual):
    expected = x if other is None else x + other
    if act is not None:
      expected = np.maximum(expected, 0)
    np.testing.assert_array_equal(module.apply({}, x, other), expected)
  half = module.clone(dtype=jnp.bfloat16).apply({}, x.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
