import itertools

import jax
import numpy as np
import pytest

from resnet_flax.data import randomness
from resnet_flax.data.randomness import Purpose


def test_draws_differ_by_seed_purpose_and_number():
  draws = [
    randomness.host_rng(seed, purpose, number).integers(2**60)
    for seed, purpose, number in itertools.product((0, 1), Purpose, (0, 1))
  ]
  assert len(set(draws)) == len(draws)
  keys = [
    jax.random.key_data(randomness.device_key(seed, purpose)).tobytes()
    for seed, purpose in itertools.product((0, 1, 2**32 - 1), Purpose)
  ]
  assert len(set(keys)) == len(keys)


def test_draws_are_what_they_always_were():
  """If this fails, every published number has another seed's value.

  Change the expected values only together with the CHANGELOG.
  """
  order = randomness.host_rng(0, Purpose.EPOCH_ORDER, 3).permutation(6)
  np.testing.assert_array_equal(order, EXPECTED_ORDER)
  key = randomness.device_key(7, Purpose.AUGMENTATION)
  np.testing.assert_array_equal(jax.random.key_data(key), EXPECTED_KEY)


@pytest.mark.parametrize("default", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_draws_do_not_depend_on_the_default_kind_of_key(default):
  """Which JAX takes from JAX_DEFAULT_PRNG_IMPL."""
  with jax.default_prng_impl(default):
    key = randomness.device_key(7, Purpose.AUGMENTATION)
    np.testing.assert_array_equal(jax.random.key_data(key), EXPECTED_KEY)


EXPECTED_ORDER = [2, 3, 5, 1, 0, 4]
EXPECTED_KEY = [195045567, 4062205631]
