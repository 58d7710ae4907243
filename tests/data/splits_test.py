import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from resnet_flax.data import splits

SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any)


@st.composite
def sizes_and_total(draw):
  sizes = np.array(draw(SIZES))
  return sizes, draw(st.integers(0, int(sizes.sum())))


@settings(deadline=None)
@given(sizes_and_total())
def test_equal_quotas(case):
  sizes, total = case
  quotas = splits.equal_quotas(sizes, total)
  assert quotas.sum() == total
  assert (quotas <= sizes).all()
  # A class has less than another only because of one left over, or because
  # it has no more to give.
  short = quotas < quotas.max() - 1
  np.testing.assert_array_equal(quotas[short], sizes[short])


@settings(deadline=None)
@given(sizes_and_total())
def test_proportional_quotas(case):
  sizes, total = case
  quotas = splits.proportional_quotas(sizes, total)
  assert quotas.sum() == total
  assert (quotas >= 0).all()
  assert (quotas <= sizes).all()
  assert (np.abs(quotas - total * sizes / sizes.sum()) < 1).all()


@pytest.mark.parametrize("quota", [0, 3, 20])
def test_draw(quota):
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 20))
  drawn = splits.draw(labels, np.full(5, quota), np.random.default_rng(1))
  assert (np.diff(drawn) > 0).all()
  assert (np.bincount(labels[drawn], minlength=5) == quota).all()
  again = splits.draw(labels, np.full(5, quota), np.random.default_rng(1))
  np.testing.assert_array_equal(drawn, again)


def test_smaller_draws_are_subsets_of_larger_ones():
  labels = np.arange(100) % 5
  small, large = (
    splits.draw(labels, np.full(5, quota), np.random.default_rng(1))
    for quota in (4, 9)
  )
  assert set(small) < set(large)
