"""Random draws as functions of (seed, purpose, step or epoch).

No random state is carried from one step to the next. So a resumed run needs
only the step to draw the same numbers as an uninterrupted run.
"""

import enum

import jax
import numpy as np


class Purpose(enum.IntEnum):
  """What a draw is for. Every result depends on the values: never renumber."""

  INITIALIZATION = 0
  AUGMENTATION = 1
  EPOCH_ORDER = 2
  VALIDATION_SPLIT = 3
  TRAIN_SUBSET = 4
  TEST_SPLIT = 5
  HOST_CROP = 6


def device_key(seed: int, purpose: Purpose) -> jax.Array:
  """A typed JAX key, shape (), for draws made inside compiled code.

  The caller folds in the step. 0 ≤ seed < 2**32. The key is threefry,
  whatever JAX_DEFAULT_PRNG_IMPL says.
  """
  key = jax.random.key(seed, impl="threefry2x32")
  return jax.random.fold_in(key, purpose)


def host_rng(seed: int, purpose: Purpose, *numbers: int) -> np.random.Generator:
  """A NumPy generator for draws on the host; a number may be the epoch."""
  return np.random.Generator(np.random.PCG64([seed, purpose, *numbers]))
