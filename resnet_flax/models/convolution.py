"""Convolution with a weight gradient that suits the platform it runs on.

XLA's own weight gradient of a convolution is good on TPUs and GPUs and slow on
CPUs, where it runs at a tenth of the speed of a matrix product. On CPUs it is
computed here as products of matrices that stay in the cache; everywhere else,
and for the other two of a convolution's three operations, XLA's own is used.
The choice is made when a program is lowered for a platform.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

_LAYOUT = ("NHWC", "HWIO", "NHWC")

# Bytes that one chunk's operands may take. The cache model: a chunk is
# written once, by the copies that make its operands, and read once, by the
# product, and should not leave the cache in between. Half a MiB is what a core
# has of second-level cache on the CPUs of the last ten years; products of
# larger chunks gain nothing, since their inner dimension is already in the
# thousands.
_CACHE_BYTES = 1 << 19


@dataclasses.dataclass(frozen=True)
class _Geometry:
  """The static part of a convolution, NHWC by HWIO.

  Attributes:
    input_hw: height and width of the input.
    kernel_hw: height and width of the kernel.
    strides: down and to the right.
    pads: zeros before and after, for rows and for columns; may be negative.
    precision: of the products, as `jax.lax.Precision` or None.
  """

  input_hw: tuple[int, ...]
  kernel_hw: tuple[int, ...]
  strides: tuple[int, ...]
  pads: tuple[tuple[int, int], tuple[int, int]]
  precision: Any

  def apply(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
      x,
      kernel,
      self.strides,
      self.pads,
      dimension_numbers=_LAYOUT,
      precision=self.precision,
    )


# The three operations are bilinear and each the derivative of the others, so
# derivatives of any order stay among them.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: jax.Array, kernel: jax.Array, geometry: _Geometry) -> jax.Array:
  return geometry.apply(x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _input_gradient(
  g: jax.Array, kernel: jax.Array, geometry: _Geometry
) -> jax.Array:
  shape = (g.shape[0], *geometry.input_hw, kernel.shape[2])
  transpose = jax.linear_transpose(
    lambda x: geometry.apply(x, kernel), jax.ShapeDtypeStruct(shape, g.dtype)
  )
  return transpose(g)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _weight_gradient(
  x: jax.Array, g: jax.Array, geometry: _Geometry
) -> jax.Array:
  return lax.platform_dependent(
    x,
    g,
    cpu=_cpu_weight_gradient(geometry),
    default=functools.partial(_standard_weight_gradient, geometry),
  )


def _keep(operation):
  """The forward rule: keeps both operands for the derivative."""

  def forward(a, b, geometry):
    return operation(a, b, geometry), (a, b)

  return forward


def _conv_backward(geometry, operands, g):
  x, kernel = operands
  return (
    _input_gradient(g, kernel, geometry),
    _weight_gradient(x, g, geometry),
  )


def _input_gradient_backward(geometry, operands, x):
  g, kernel = operands
  return _conv(x, kernel, geometry), _weight_gradient(x, g, geometry)


def _weight_gradient_backward(geometry, operands, kernel):
  x, g = operands
  return _input_gradient(g, kernel, geometry), _conv(x, kernel, geometry)


_conv.defvjp(_keep(_conv), _conv_backward)
_input_gradient.defvjp(_keep(_input_gradient), _input_gradient_backward)
_weight_gradient.defvjp(_keep(_weight_gradient), _weight_gradient_backward)


def _standard_weight_gradient(
  geometry: _Geometry, x: jax.Array, g: jax.Array
) -> jax.Array:
  shape = (*geometry.kernel_hw, x.shape[-1], g.shape[-1])
  transpose = jax.linear_transpose(
    lambda kernel: geometry.apply(x, kernel),
    jax.ShapeDtypeStruct(shape, x.dtype),
  )
  return transpose(g)[0]


@functools.cache
def _cpu_weight_gradient(geometry: _Geometry):
  """The weight gradient for CPUs as a function of (x, g).

  On a batch that is sharded over devices each one works on its own part: a
  loop over chunks of the whole batch would make the partitioner gather it.
  """
  local = functools.partial(_chunked_weight_gradient, geometry)
  partitioned = custom_partitioning(local)

  def partition(mesh, arg_shapes, result_shape):
    del result_shape
    spec = arg_shapes[0].sharding.spec
    axis = spec[0] if len(spec) else None
    batch = NamedSharding(mesh, PartitionSpec(axis))
    whole = NamedSharding(mesh, PartitionSpec())

    def lower(x, g):
      part = local(x, g)
      return part if axis is None else lax.psum(part, axis)

    return mesh, lower, whole, (batch, batch)

  partitioned.def_partition(
    partition,
    infer_sharding_from_operands=lambda mesh, args, result: NamedSharding(
      mesh, PartitionSpec()
    ),
    sharding_rule="n h w c, n p q d -> k l c d",
    reduction_factors=("n",),
    need_replication_factors=("h", "w", "c", "p", "q", "d", "k", "l"),
  )

  @custom_vmap
  def weight_gradient(x, g):
    return partitioned(x, g)

  @weight_gradient.def_vmap
  def _(axis_size, in_batched, x, g):
    del axis_size
    axes = tuple(0 if batched else None for batched in in_batched)
    return jax.vmap(local, in_axes=axes)(x, g), True

  return weight_gradient


def _chunked_weight_gradient(
  geometry: _Geometry, x: jax.Array, g: jax.Array
) -> jax.Array:
  images = x.shape[0]
  contribution = functools.partial(_chunk_contribution, geometry)
  size = _chunk_size(geometry, x, g)
  if size >= images:
    return contribution(x, g).astype(x.dtype)
  chunks, rest = divmod(images, size)

  def add(total, chunk):
    return total + contribution(*chunk), None

  whole = chunks * size
  shape = (*geometry.kernel_hw, x.shape[-1], g.shape[-1])
  total, _ = lax.scan(
    add,
    jnp.zeros(shape, _accumulator(x.dtype)),
    (
      x[:whole].reshape(chunks, size, *x.shape[1:]),
      g[:whole].reshape(chunks, size, *g.shape[1:]),
    ),
  )
  if rest:
    total = total + contribution(x[whole:], g[whole:])
  return total.astype(x.dtype)


def _chunk_size(geometry: _Geometry, x: jax.Array, g: jax.Array) -> int:
  """Images of a chunk, by the cache model; see `_CACHE_BYTES`."""
  (kh, kw), (_, p, q, d) = geometry.kernel_hw, g.shape
  c = x.shape[-1]
  if geometry.kernel_hw == (1, 1):
    return x.shape[0]  # Nothing is copied, so nothing need stay in the cache.
  stacked = geometry.strides == (1, 1)
  per_pixel = kh * c + kw * d if stacked else kh * kw * c + d
  per_image = p * (q + kw - 1 if stacked else q) * per_pixel * x.dtype.itemsize
  # The sum is read and written for every chunk: that must not be the larger
  # part of its traffic.
  sum_bytes = kh * kw * c * d * x.dtype.itemsize
  return max(1, max(_CACHE_BYTES, sum_bytes) // per_image)


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
  return jnp.promote_types(dtype, jnp.float32)


def _chunk_contribution(
  geometry: _Geometry, x: jax.Array, g: jax.Array
) -> jax.Array:
  """One matrix product over all positions of some images."""
  (kh, kw), (sh, sw) = geometry.kernel_hw, geometry.strides
  _, p, q, d = g.shape
  c = x.shape[-1]
  product = functools.partial(
    lax.dot_general,
    dimension_numbers=(((0,), (0,)), ((), ())),
    precision=geometry.precision,
    preferred_element_type=_accumulator(x.dtype),
  )
  if geometry.pads != ((0, 0), (0, 0)):
    x = _pad(x, *geometry.pads)
  if (kh, kw) == (1, 1):
    x = x[:, : (p - 1) * sh + 1 : sh, : (q - 1) * sw + 1 : sw]
    return product(x.reshape(-1, c), g.reshape(-1, d))[None, None]
  if (sh, sw) == (1, 1):
    # Row shifts on one side, column shifts on the other: kh * kw products of
    # one pixel each from kh + kw copies of it.
    width = q + kw - 1
    rows = [x[:, i : i + p, :width] for i in range(kh)]
    wide = _pad(g, (0, 0), (kw - 1, kw - 1))
    columns = [wide[:, :, kw - 1 - j :][:, :, :width] for j in range(kw)]
    result = product(
      jnp.concatenate(rows, -1).reshape(-1, kh * c),
      jnp.concatenate(columns, -1).reshape(-1, kw * d),
    )
    return result.reshape(kh, c, kw, d).transpose(0, 2, 1, 3)
  patches = [
    x[:, i : i + (p - 1) * sh + 1 : sh, j : j + (q - 1) * sw + 1 : sw]
    for i in range(kh)
    for j in range(kw)
  ]
  result = product(
    jnp.concatenate(patches, -1).reshape(-1, kh * kw * c), g.reshape(-1, d)
  )
  return result.reshape(kh, kw, c, d)


def _pad(
  x: jax.Array, rows: tuple[int, int], columns: tuple[int, int]
) -> jax.Array:
  config = ((0, 0, 0), (*rows, 0), (*columns, 0), (0, 0, 0))
  return lax.pad(x, jnp.zeros((), x.dtype), config)


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  precision: Any = None,
) -> jax.Array:
  """`jax.lax.conv_general_dilated`, with this module's weight gradient.

  For `flax.linen.Conv(conv_general_dilated=...)`. Dilated and grouped
  convolutions, and others than two-dimensional NHWC ones, are passed on to
  JAX as they are. Reverse-mode derivatives of any order, `vmap` and batches
  that are sharded over devices work; forward mode does not (JAX says so).

  Args:
    lhs: float[N, H, W, C].
    rhs: float[KH, KW, C, D].
    window_strides: down and to the right.
    padding: 'SAME', 'VALID' or explicit pairs.
    lhs_dilation: as for JAX.
    rhs_dilation: as for JAX.
    dimension_numbers: as for JAX.
    feature_group_count: as for JAX.
    precision: as for JAX.

  Returns:
    float[N, H', W', D].
  """
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  plain = (
    lhs.ndim == 4
    and numbers == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)
    and feature_group_count == 1
    and math.prod(lhs_dilation or (1,)) == 1
    and math.prod(rhs_dilation or (1,)) == 1
    and lhs.dtype == rhs.dtype
  )
  if not plain:
    return lax.conv_general_dilated(
      lhs,
      rhs,
      window_strides,
      padding,
      lhs_dilation,
      rhs_dilation,
      dimension_numbers,
      feature_group_count,
      precision=precision,
    )
  input_hw, kernel_hw = lhs.shape[1:3], rhs.shape[:2]
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(input_hw, kernel_hw, window_strides, padding)
  (top, bottom), (left, right) = padding
  geometry = _Geometry(
    input_hw,
    kernel_hw,
    tuple(window_strides),
    ((int(top), int(bottom)), (int(left), int(right))),
    precision,
  )
  return _conv(lhs, rhs, geometry)
