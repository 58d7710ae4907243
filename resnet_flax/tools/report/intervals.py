"""Intervals and tests of the difference between two groups."""

import warnings

import numpy as np
from scipy import stats

_ROUNDING = 1e-9  # Spreads below it are none.


def interval(
  a: np.ndarray, b: np.ndarray, *, paired: bool
) -> tuple[float, float, float] | None:
  """The 95 % t interval of mean(a) - mean(b), of float64[N] and float64[M].

  Welch's, unless `paired`, when a[k] and b[k] belong together.

  Returns:
    Its ends, and the two-sided p of no difference; None if they cannot be told:
    a side has one value, or nothing is spread.
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
  """The two-sided p of McNemar's exact test, of bool[N] or int64[N].

  Counts of equally many networks give the sign test of the images that more
  networks of one side than of the other get right.
  """
  more_a, more_b = np.sum(right_a > right_b), np.sum(right_a < right_b)
  both = int(more_a + more_b)
  return stats.binomtest(int(more_a), both).pvalue if both else 1.0


def seeds_needed(a: np.ndarray, b: np.ndarray, points: float) -> int | None:
  """The fewest seeds of each side with which a t-test finds a difference.

  At 5 %, two-sided, in 80 % of cases, with the pooled standard deviation of
  float64[N] and float64[M]; None if they have none.
  """
  freedom = len(a) + len(b) - 2
  if np.ptp(a) + np.ptp(b) < _ROUNDING:
    return None
  variance = (len(a) * np.var(a) + len(b) * np.var(b)) / freedom
  effect = points / np.sqrt(variance)
  # With a known deviation it would be this many; it is not fewer.
  n = max(2, int(2 * (stats.norm.ppf([0.975, 0.8]).sum() / effect) ** 2))

  def power() -> float:
    limit = stats.t.ppf(0.975, 2 * n - 2)
    return stats.nct.sf(limit, 2 * n - 2, effect * np.sqrt(n / 2))

  while power() < 0.8:
    n += 1
  return n
