"""Intervals and tests of the difference between two groups."""

import warnings

import numpy as np
from scipy import stats

_ROUNDING = 1e-9  # A smaller spread counts as none.


def interval(
  a: np.ndarray, b: np.ndarray, *, paired: bool
) -> tuple[float, float, float] | None:
  """The 95 % t interval of mean(a) - mean(b), of float64[N] and float64[M].

  The test is Welch's or, if `paired`, a paired t-test of each a[k] and b[k].
  Returns the interval's two ends and the two-sided p-value of equal means. None
  if a side has only one value, or if there is no spread.
  """
  if min(len(a), len(b)) < 2:
    return None
  spread = np.ptp(a - b) if paired else np.ptp(a) + np.ptp(b)
  if spread < _ROUNDING:
    return None
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # One side has no spread.
    welch = {"equal_var": False}
    test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, **welch)
  low, high = test.confidence_interval(0.95)
  return float(low), float(high), float(test.pvalue)


def mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> float:
  """The two-sided p-value of McNemar's exact test, of bool[N] or int64[N].

  An integer counts the networks that are right about an image; both sides must
  have equally many networks. Then this is a sign test: the larger count wins.
  """
  more_a, more_b = np.sum(right_a > right_b), np.sum(right_a < right_b)
  unequal = int(more_a + more_b)
  return stats.binomtest(int(more_a), unequal).pvalue if unequal else 1.0


def seeds_needed(a: np.ndarray, b: np.ndarray, points: float) -> int | None:
  """The fewest seeds per side for a t-test to detect a difference of `points`.

  The test is two-sided at 5 % and has 80 % power. It uses the pooled standard
  deviation of float64[N] `a` and float64[M] `b`; None if they have no spread.
  """
  freedom = len(a) + len(b) - 2
  if np.ptp(a) + np.ptp(b) < _ROUNDING:
    return None
  variance = (len(a) * np.var(a) + len(b) * np.var(b)) / freedom
  effect = points / np.sqrt(variance)
  # A known deviation needs n seeds, an estimated deviation at least as many.
  n = max(2, int(2 * (stats.norm.ppf([0.975, 0.8]).sum() / effect) ** 2))

  def power() -> float:
    limit = stats.t.ppf(0.975, 2 * n - 2)
    return stats.nct.sf(limit, 2 * n - 2, effect * np.sqrt(n / 2))

  while power() < 0.8:
    n += 1
  return n
