"""Reductions of many arrays: their values, and the program they make."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.models.kernels import grouping as leaves
from resnet_flax.parallel import mesh as mesh_lib


def make(count):
  rng = np.random.default_rng(0)
  return [
    jnp.asarray(rng.normal(size=(2, 1 + k % 3)), jnp.float32)
    for k in range(count)
  ]


@jax.jit
def sums(arrays):
  return leaves.reduce_each(jnp.sum, arrays)


@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_one_scalar_for_each_in_order(count):
  arrays = make(count)
  np.testing.assert_allclose(
    sums(arrays), [np.sum(x) for x in arrays], rtol=1e-5, atol=1e-6
  )


def test_has_a_gradient():
  arrays = make(70)
  gradients = jax.grad(
    lambda xs: jnp.sum(leaves.reduce_each(lambda x: jnp.sum(x**2), xs))
  )(arrays)
  for gradient, x in zip(gradients, arrays, strict=True):
    np.testing.assert_allclose(gradient, 2 * x, rtol=1e-6)


def test_same_on_several_devices():
  mesh = mesh_lib.create_mesh()
  arrays = make(70)
  replicated = jax.device_put(arrays, mesh_lib.sharding(mesh))
  np.testing.assert_array_equal(sums(replicated), sums(arrays))


def test_groups_are_computations_of_their_own():
  """Otherwise XLA's fusion pass takes time as the cube of their number."""
  program = jax.jit(
    # What makes the arrays would otherwise be fused with what reduces them.
    lambda xs: leaves.reduce_each(jnp.sum, [jnp.sin(x) for x in xs])
  )
  text = program.lower(make(200)).compile().as_text()
  entry = text[text.index("\nENTRY") :]
  assert len(re.findall(r" call\(", entry)) == 4  # Of 64, at most.
  assert " reduce(" not in entry
