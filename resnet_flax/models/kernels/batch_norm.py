"""Batch normalisation, residual sum and activation in the fewest passes.

A convolution's output is too large for the cache, so the time of normalisation
depends on the number of passes over memory. The gradient is therefore the
closed form of Ioffe and Szegedy 2015 (arXiv:1502.03167, section 3), which needs
the layer's input and two sums over it. The normalised values, the sum with the
residual and the activation's mask are never stored, but computed again.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

Activation = Callable[[Array], Array]


def _like(x: Array, per_channel: Array) -> Array:
  """Reshapes one value per channel to the rank of x."""
  return per_channel.reshape((1,) * (x.ndim - 1) + (-1,))


def _normalize(centered, variance, scale, bias, epsilon) -> Array:
  factor = scale * lax.rsqrt(variance + epsilon)
  return centered * _like(centered, factor) + _like(centered, bias)


def _finish(normalized, residual, act, dtype) -> Array:
  y = normalized.astype(dtype)
  if residual is not None:
    y = residual + y
  return y if act is None else act(y)


def _forward(x, scale, bias, residual, epsilon, act, dtype):
  axes = tuple(range(x.ndim - 1))
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # For the sums.
  mean = jnp.mean(wide, axes)
  # Flax's formula: one pass is enough, since neither sum needs the other.
  variance = jnp.mean(lax.square(wide), axes) - lax.square(mean)
  statistics = mean, variance = mean, jnp.maximum(variance, 0)
  normalized = _normalize(x - _like(x, mean), variance, scale, bias, epsilon)
  y = _finish(normalized, residual, act, dtype)
  return (y, statistics), (x, scale, bias, residual, statistics)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _normalize_batch(x, scale, bias, residual, epsilon, act, dtype):
  """act(residual + batch_norm(x)) and the batch's mean and variance."""
  return _forward(x, scale, bias, residual, epsilon, act, dtype)[0]


def _backward(epsilon, act, dtype, saved, cotangents):
  x, scale, bias, residual, (mean, variance) = saved
  g, (g_mean, g_variance) = cotangents
  # Not x - mean: XLA would recognise the forward pass's value and store it,
  # although computing it again is cheaper.
  centered = x + _like(x, -mean)
  normalized = _normalize(centered, variance, scale, bias, epsilon)
  _, finish_vjp = jax.vjp(
    lambda y, residual: _finish(y, residual, act, dtype), normalized, residual
  )
  g, g_residual = finish_vjp(g)
  inverse_std = lax.rsqrt(variance + epsilon)
  axes = tuple(range(x.ndim - 1))
  count = x.size // x.shape[-1]
  g_bias = jnp.sum(g, axes)
  g_scale = jnp.sum(g * centered, axes) * inverse_std
  # d(mean)/dx = 1 / count, d(variance)/dx = 2 * centered / count. Gradients of
  # the statistics come from the normalisation and from their other users.
  through_mean = (g_mean - scale * inverse_std * g_bias) / count
  through_variance = (2 * g_variance - scale * inverse_std**2 * g_scale) / count
  g_x = (
    _like(x, scale * inverse_std) * g
    + _like(x, through_variance) * centered
    + _like(x, through_mean)
  )
  g_scale, g_bias = g_scale.astype(scale.dtype), g_bias.astype(bias.dtype)
  return g_x.astype(x.dtype), g_scale, g_bias, g_residual


_normalize_batch.defvjp(_forward, _backward)


class NoNorm(nn.Module):
  """Replaces `BatchNorm`: only the residual sum and the activation."""

  use_running_average: bool  # Has no effect.
  dtype: Any = jnp.float32  # The result's dtype.
  act: Activation | None = None  # Elementwise, applied last; None for none.

  def __call__(self, x: Array, residual: Array | None = None) -> Array:
    """Maps float[..., C] to act(residual + x), in `dtype`."""
    return _finish(x, residual, self.act, self.dtype)


class BatchNorm(nn.Module):
  """`flax.linen.BatchNorm`, then a residual sum and an activation.

  Parameters (`scale`, `bias`), statistics (`mean`, `var`, float32 in
  `batch_stats`) and results are as in `flax.linen.BatchNorm` over the last
  axis. A sharded batch is normalised as a whole. With several `groups`, each
  has its own statistics ('ghost batch norm', Hoffer et al. 2017,
  arXiv:1705.08741, section 4). The mean over groups updates the running
  statistics; in the paper each group does. Devices that hold whole groups
  exchange only the updates of running statistics and parameters.
  """

  use_running_average: bool  # False: use batch statistics, update the average.
  momentum: float = 0.99  # Share of the old running statistics that is kept.
  epsilon: float = 1e-5  # Added to the variance.
  dtype: Any = jnp.float32  # The result's dtype.
  act: Activation | None = None  # Elementwise, applied last; None for none.
  groups: int = 1  # Equal, contiguous parts of the batch.

  @nn.compact
  def __call__(self, x: Array, residual: Array | None = None) -> Array:
    """Maps float[..., C] to act(residual + batch_norm(x)), in `dtype`."""
    shape_dtype = (x.shape[-1],), jnp.float32
    mean = self.variable("batch_stats", "mean", jnp.zeros, *shape_dtype)
    variance = self.variable("batch_stats", "var", jnp.ones, *shape_dtype)
    scale = self.param("scale", nn.initializers.ones, *shape_dtype)
    bias = self.param("bias", nn.initializers.zeros, *shape_dtype)
    if self.use_running_average:
      y = x - _like(x, mean.value)
      y = _normalize(y, variance.value, scale, bias, self.epsilon)
      return _finish(y, residual, self.act, self.dtype)
    options = self.epsilon, self.act, self.dtype

    def of_group(x, residual):
      return _normalize_batch(x, scale, bias, residual, *options)

    if self.groups == 1:
      y, statistics = of_group(x, residual)
    else:
      parts = jax.tree.map(
        lambda leaf: leaf.reshape(self.groups, -1, *leaf.shape[1:]),
        (x, residual),
      )
      y, group_statistics = jax.vmap(of_group)(*parts)
      statistics = [jnp.mean(each, axis=0) for each in group_statistics]
      y = y.reshape(x.shape)
    if not self.is_initializing():
      keep = self.momentum
      for running, new in zip((mean, variance), statistics, strict=True):
        running.value = keep * running.value + (1 - keep) * new
    return y
