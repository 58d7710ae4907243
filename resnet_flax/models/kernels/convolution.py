"""Convolution in the form that suits the platform it runs on.

XLA's own convolution is good on TPUs and GPUs. On CPUs it is half as fast as
oneDNN's, and its weight gradient runs at a tenth of the speed of a matrix
product. So on CPUs all three operations of a float32 convolution are
forward convolutions of oneDNN, where jaxlib brings it (`onednn`); only the
weight gradient of a 1x1 kernel is one product of matrices. Otherwise the weight
gradient is computed there as products of matrices that stay in the cache, and
the rest by XLA. Everywhere else all three are XLA's. The choice is made when a
program is lowered for a platform.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import NamedSharding, PartitionSpec

from resnet_flax.models.kernels import onednn

_LAYOUT = ("NHWC", "HWIO", "NHWC")

# The weight gradient is a sum over images, computed in chunks by this cache
# model: a chunk's operands are copied into another order and then read once,
# and should not leave the second-level cache in between. CPUs of the last ten
# years have half a MiB to two of it for a core.
#
# Bytes of the copies of one chunk for a product of matrices, which one core
# makes. Larger chunks gain nothing, since the inner dimension is already in
# the thousands.
_PRODUCT_BYTES = 1 << 19
# Bytes of the operands of one chunk for oneDNN, whose threads share them.
_CONVOLVED_BYTES = 1 << 21


@dataclasses.dataclass(frozen=True)
class _Geometry:
  """The static part of a convolution, NHWC by HWIO."""

  input_hw: tuple[int, ...]  # Height and width of the input.
  kernel_hw: tuple[int, ...]  # Height and width of the kernel.
  strides: tuple[int, ...]  # Down and to the right.
  # Zeros before and after, for rows and for columns; may be negative.
  pads: tuple[tuple[int, int], tuple[int, int]]
  precision: Any  # Of the products, as `jax.lax.Precision` or None.

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
  return _per_platform(_CONV, geometry, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _input_gradient(
  g: jax.Array, kernel: jax.Array, geometry: _Geometry
) -> jax.Array:
  return _per_platform(_INPUT_GRADIENT, geometry, g, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _weight_gradient(
  x: jax.Array, g: jax.Array, geometry: _Geometry
) -> jax.Array:
  return _per_platform(_WEIGHT_GRADIENT, geometry, x, g)


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


def _standard_conv(
  geometry: _Geometry, x: jax.Array, kernel: jax.Array
) -> jax.Array:
  return geometry.apply(x, kernel)


def _standard_input_gradient(
  geometry: _Geometry, g: jax.Array, kernel: jax.Array
) -> jax.Array:
  shape = (g.shape[0], *geometry.input_hw, kernel.shape[2])
  transpose = jax.linear_transpose(
    lambda x: geometry.apply(x, kernel), jax.ShapeDtypeStruct(shape, g.dtype)
  )
  return transpose(g)[0]


def _standard_weight_gradient(
  geometry: _Geometry, x: jax.Array, g: jax.Array
) -> jax.Array:
  shape = (*geometry.kernel_hw, x.shape[-1], g.shape[-1])
  transpose = jax.linear_transpose(
    lambda kernel: geometry.apply(x, kernel),
    jax.ShapeDtypeStruct(shape, x.dtype),
  )
  return transpose(g)[0]


def _cpu_conv(
  geometry: _Geometry, x: jax.Array, kernel: jax.Array
) -> jax.Array:
  if not onednn.can_convolve(x.dtype):
    return _standard_conv(geometry, x, kernel)
  return onednn.convolve(x, kernel, geometry.strides, geometry.pads)


def _cpu_input_gradient(
  geometry: _Geometry, g: jax.Array, kernel: jax.Array
) -> jax.Array:
  """Convolutions of g with the kernel, turned by 180 degrees.

  Input rows that are a stride apart meet the same rows of the kernel, and so
  do columns. Each such phase of the result is a convolution with its part of
  the kernel, so that no product with an inserted zero is computed.
  """
  if not onednn.can_convolve(g.dtype):
    return _standard_input_gradient(geometry, g, kernel)
  (sh, sw), (height, width) = geometry.strides, geometry.input_hw
  kernel = kernel.swapaxes(2, 3)

  def phase(row: int, column: int) -> jax.Array:
    (i, row_pads), (j, column_pads) = (
      _phase(start, size, k, stride, before, out)
      for start, size, k, stride, (before, _), out in zip(
        (row, column),
        geometry.input_hw,
        geometry.kernel_hw,
        geometry.strides,
        geometry.pads,
        g.shape[1:3],
        strict=True,
      )
    )
    part = jnp.flip(kernel[i::sh, j::sw], (0, 1))
    if not part.size:
      shape = -(-height // sh), -(-width // sw)
      return jnp.zeros((g.shape[0], *shape, kernel.shape[3]), g.dtype)
    return onednn.convolve(g, part, (1, 1), (row_pads, column_pads))

  if (sh, sw) == (1, 1):
    return phase(0, 0)
  rows = [
    jnp.stack([phase(row, column) for column in range(sw)], 3)
    for row in range(sh)
  ]
  phases = jnp.stack(rows, 2)
  n, p, _, q, _, c = phases.shape
  return phases.reshape(n, p * sh, q * sw, c)[:, :height, :width]


def _phase(
  start: int, size: int, k: int, stride: int, before: int, out: int
) -> tuple[int, tuple[int, int]]:
  """In one dimension, what gives the input gradient at start::stride.

  Returns:
    The first element of the kernel that takes part, and the padding of the
    convolution with these elements, which gives ceil(size / stride) elements.
  """
  first = (start + before) % stride
  taps = -(-(k - first) // stride)
  pad = taps - 1 - (start + before - first) // stride
  return first, (pad, -(-size // stride) - out - pad + taps - 1)


def _cpu_weight_gradient(
  geometry: _Geometry, x: jax.Array, g: jax.Array
) -> jax.Array:
  # A function that XLA does not inline finds its operands in memory. Inlined,
  # what computes x would be computed again in the order that a copy needs.
  with set_xla_metadata(inlineable="false"):
    return _chunked_weight_gradient(geometry, x, g)


@functools.partial(jax.jit, static_argnums=0)
def _chunked_weight_gradient(
  geometry: _Geometry, x: jax.Array, g: jax.Array
) -> jax.Array:
  images = x.shape[0]
  shape = (*geometry.kernel_hw, x.shape[-1], g.shape[-1])
  if not (x.size and g.size):
    return jnp.zeros(shape, x.dtype)
  if onednn.can_convolve(x.dtype) and geometry.kernel_hw != (1, 1):
    form, size = _convolved_contribution, _convolved_chunk_size(x, g)
  else:
    form, size = _product_contribution, _product_chunk_size(geometry, x, g)
  contribution = functools.partial(form, geometry)
  if size >= images:
    return contribution(x, g).astype(x.dtype)
  chunks, rest = divmod(images, size)

  def add(total, chunk):
    return total + contribution(*chunk), None

  whole = chunks * size
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


def _convolved_chunk_size(x: jax.Array, g: jax.Array) -> int:
  """Images of a chunk, by the cache model; see `_CONVOLVED_BYTES`."""
  per_image = math.prod(x.shape[1:]) + math.prod(g.shape[1:])
  return max(1, _CONVOLVED_BYTES // (per_image * x.dtype.itemsize))


def _convolved_contribution(
  geometry: _Geometry, x: jax.Array, g: jax.Array
) -> jax.Array:
  """The weight gradient of some images as one forward convolution.

  The sum over images becomes the one over input channels, the gradient the
  kernel, and a step of the kernel to the right one of C elements, so that all
  C channels of the input lie side by side in the width:

    dW[i, j * C + c, d] = sum_npq X[p * SH + i, (q * SW + j) * C + c, n]
                                  * G[p, q, n, d]
  """
  (kh, kw), (sh, sw) = geometry.kernel_hw, geometry.strides
  (top, _), (left, _) = geometry.pads
  n, h, w, c = x.shape
  _, p, q, d = g.shape
  # What is needed after the input; where strides skip it, the rest is cut off.
  bottom = (p - 1) * sh + kh - h - top
  right = (q - 1) * sw + kw - w - left
  result = onednn.convolve(
    x.reshape(n, h * w * c).T.reshape(1, h, w * c, n),
    g.transpose(1, 2, 0, 3),
    (1, 1),
    ((top, bottom), (left * c, right * c)),
    (sh, sw * c),
  )
  return result.reshape(kh, kw, c, d)


def _product_chunk_size(geometry: _Geometry, x: jax.Array, g: jax.Array) -> int:
  """Images of a chunk, by the cache model; see `_PRODUCT_BYTES`."""
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
  return max(1, max(_PRODUCT_BYTES, sum_bytes) // per_image)


def _accumulator(dtype: jnp.dtype) -> jnp.dtype:
  return jnp.promote_types(dtype, jnp.float32)


def _product_contribution(
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


@dataclasses.dataclass(frozen=True)
class _Operation:
  """One of the three, in the forms that the platforms take."""

  # The function of (geometry, a, b) for CPUs.
  cpu: Callable[[_Geometry, jax.Array, jax.Array], jax.Array]
  # The same elsewhere.
  standard: Callable[[_Geometry, jax.Array, jax.Array], jax.Array]
  # Which dimensions of operands and result are the same; `n`, the images, is
  # the only one that devices may share out.
  sharding_rule: str
  # The result is a sum over images, not one per image.
  sums_over_batch: bool = False


_CONV = _Operation(
  _cpu_conv,
  _standard_conv,
  "n h w c, k l c d -> n p q d",
)
_INPUT_GRADIENT = _Operation(
  _cpu_input_gradient,
  _standard_input_gradient,
  "n p q d, k l c d -> n h w c",
)
_WEIGHT_GRADIENT = _Operation(
  _cpu_weight_gradient,
  _standard_weight_gradient,
  "n h w c, n p q d -> k l c d",
  sums_over_batch=True,
)


def _per_platform(
  operation: _Operation, geometry: _Geometry, a: jax.Array, b: jax.Array
) -> jax.Array:
  return lax.platform_dependent(
    a,
    b,
    cpu=_cpu_form(operation, geometry),
    default=functools.partial(operation.standard, geometry),
  )


def _cpu_form(
  operation: _Operation, geometry: _Geometry
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """The CPU form for where it is called: by itself or in a `shard_map`."""
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.manual_axes:
    return _partitioned(operation, geometry)
  # JAX refuses custom partitioning there. Where the batch may be divided over
  # an axis that is left to the partitioner, it is given what it knows.
  left = [n for axis, n in mesh.shape.items() if axis not in mesh.manual_axes]
  is_local = math.prod(left) == 1
  return functools.partial(
    operation.cpu if is_local else operation.standard, geometry
  )


@functools.cache
def _partitioned(operation: _Operation, geometry: _Geometry):
  """The CPU form on a batch that may be sharded: each device its own part.

  The partitioner knows neither oneDNN's convolution nor that a loop over
  chunks of the batch could be split; it would gather the whole batch.
  """
  local = functools.partial(operation.cpu, geometry)
  partitioned = custom_partitioning(local)
  whole = PartitionSpec()

  def batch_spec(arg_shapes) -> PartitionSpec:
    spec = arg_shapes[0].sharding.spec
    return PartitionSpec(spec[0] if len(spec) else None)

  def result_spec(batch: PartitionSpec) -> PartitionSpec:
    return whole if operation.sums_over_batch else batch

  def partition(mesh, arg_shapes, result_shape):
    del result_shape
    (axis,) = batch = batch_spec(arg_shapes)
    in_specs = batch, batch if operation.sums_over_batch else whole

    def lower(a, b):
      part = local(a, b)
      if operation.sums_over_batch and axis is not None:
        return lax.psum(part, axis)
      return part

    return (
      mesh,
      lower,
      NamedSharding(mesh, result_spec(batch)),
      tuple(NamedSharding(mesh, spec) for spec in in_specs),
    )

  def infer_sharding(mesh, arg_shapes, result_shape):
    del result_shape
    return NamedSharding(mesh, result_spec(batch_spec(arg_shapes)))

  partitioned.def_partition(
    partition,
    infer_sharding_from_operands=infer_sharding,
    sharding_rule=operation.sharding_rule,
    reduction_factors=("n",) if operation.sums_over_batch else (),
    need_replication_factors=_all_but_images(operation.sharding_rule),
  )

  @custom_vmap
  def call(a, b):
    return partitioned(a, b)

  @call.def_vmap
  def _(axis_size, in_batched, a, b):
    del axis_size
    axes = tuple(0 if batched else None for batched in in_batched)
    return jax.vmap(local, in_axes=axes)(a, b), True

  return call


def _all_but_images(sharding_rule: str) -> tuple[str, ...]:
  """The other factors, in the order of the rule, as the partitioner wants."""
  factors = dict.fromkeys(re.findall(r"[a-z]", sharding_rule))
  return tuple(factor for factor in factors if factor != "n")


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
  """`jax.lax.conv_general_dilated` in this module's forms.

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
    precision: as for JAX; oneDNN always computes in float32.

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
    tuple(int(stride) for stride in window_strides),
    ((int(top), int(bottom)), (int(left), int(right))),
    precision,
  )
  return _conv(lhs, rhs, geometry)
