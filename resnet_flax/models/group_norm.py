"""Group norm and weight standardisation, which use no batch statistics."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

_GROUPS, _LEAST_CHANNELS, _EPSILON = 32, 8, 1e-5


class GroupNorm(nn.Module):
  """Replaces `BatchNorm`. Source: Wu and He 2018 (arXiv:1803.08494).

  There are 32 equal groups of channels, as in the paper, or fewer, so that each
  has 8 channels or more (if C >= 8). Parameters: `scale`, `bias`, float32[C].
  """

  use_running_average: bool  # Has no effect.
  dtype: Any = jnp.float32  # The result's dtype.
  act: Callable[[Array], Array] | None = None  # Elementwise, applied last.

  @nn.compact
  def __call__(self, x: Array, residual: Array | None = None) -> Array:
    """Maps float[..., C] to act(residual + group_norm(x)), in `dtype`."""
    channels = x.shape[-1]
    limit = min(_GROUPS, max(channels // _LEAST_CHANNELS, 1))
    norm = nn.GroupNorm(math.gcd(channels, limit), None, _EPSILON, self.dtype)
    nn.share_scope(self, norm)
    y = norm(x)
    y = y if residual is None else residual + y
    return y if self.act is None else self.act(y)


def standardize(convolve: Callable[..., Array] | None) -> Callable[..., Array]:
  """Wraps `convolve`: kernels get mean 0 and variance 1 per output channel.

  Weight standardisation (Qiao et al. 2019, arXiv:1903.10520, equations 5 to 8).
  None stands for `jax.lax.conv_general_dilated`.
  """

  def standardized(x, kernel, *args, **kwargs):
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    wide = jax.nn.standardize(wide, (0, 1, 2), epsilon=_EPSILON)
    kernel = wide.astype(kernel.dtype)
    return (convolve or lax.conv_general_dilated)(x, kernel, *args, **kwargs)

  return standardized
