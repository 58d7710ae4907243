"""Every array exactly once, in the right shape, or none."""

import pathlib

import jax
import numpy as np
import pytest

from resnet_flax.run import errors
from resnet_flax.tools.weights import files, mapping

LIKE = {
  "params": {"a": jax.ShapeDtypeStruct((2, 3), np.float32)},
  "batch_stats": {"var": jax.ShapeDtypeStruct((3,), np.float32)},
}


def origin(path):
  view = np.transpose if path[-1] == "a" else np.asarray
  return mapping.Origin(f"their_{path[-1]}", view)


SOURCE = mapping.Source("a network", 0, origin, ())


def good():
  return {
    "their_a": np.arange(6, dtype=np.float32).reshape(3, 2),
    "their_var": np.ones(3, np.float32),
  }


def variables(arrays):
  file = files.WeightsFile(pathlib.Path("a.h5"), "keras", arrays, ())
  return mapping.variables(file, SOURCE, LIKE)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_good(dtype):
  ours = variables({k: v.astype(dtype) for k, v in good().items()})
  np.testing.assert_array_equal(ours["params"]["a"], good()["their_a"].T)
  assert ours["params"]["a"].dtype == np.float32
  assert ours["params"]["a"].flags.c_contiguous


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"more": np.ones((4, 5), np.float32)},
      r"Left over: more\[4, 5\]. Missing: none",
    ),
    (
      {"their_a": None},
      r"Left over: none. Missing: their_a\[3, 2\] for params/a",
    ),
    (
      {"their_a": None, "their_b": np.ones(2, np.float32)},
      r"Left over: their_b\[2\]. Missing: their_a",
    ),
    (
      {"their_a": np.ones((2, 3), np.float32)},
      r"Left over: their_a\[2, 3\]. Missing: their_a\[3, 2\] for params/a",
    ),
    (
      {"their_a": np.ones(6, np.float32)},
      r"over: their_a\[6\]. Missing: their_a\[3, 2\]",
    ),
    ({"their_a": np.ones((3, 2), np.int32)}, "their_a is int32; it must be"),
    ({"their_a": np.full((3, 2), np.nan)}, "their_a must hold numbers"),
    (
      {"their_a": np.full((3, 2), 1e300)},
      "must hold numbers that are finite in float32",
    ),
    ({"their_var": -np.ones(3)}, "their_var must hold variances of"),
  ],
)
def test_bad(change, message):
  arrays = {k: v for k, v in (good() | change).items() if v is not None}
  with pytest.raises(errors.WeightsError, match=message):
    variables(arrays)


def test_long_lists_are_cut():
  more = {f"more{k}": np.ones(1, np.float32) for k in range(100)}
  with pytest.raises(errors.WeightsError, match="and 70 more") as raised:
    variables(good() | more)
  assert len(str(raised.value).splitlines()) == 1
