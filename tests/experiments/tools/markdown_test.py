"""The numbers in tables."""

from experiments.tools import markdown


def test_spread_is_median_least_and_most():
  assert markdown.spread([3.0, 1.0, 9.0], ".0f") == "3 (1–9)"
  assert markdown.spread([], ".0f") == "–"


def test_one_value_has_no_deviation():
  assert markdown.mean_and_std([1.0, 2.0, 3.0], ".1f") == "2.0 ± 1.0"
  assert markdown.mean_and_std([1.0], ".1f") == "1.0"
  assert markdown.mean_and_std([], ".1f") == "–"
