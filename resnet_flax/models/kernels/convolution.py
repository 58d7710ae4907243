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
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import NamedSharding, PartitionSpec

from resnet_flax.models.kernels import onednn

_LAYOUT = ("NHWC", "HWIO", "NHWC")

# The weight gradient is a sum over images, computed in chunks: a chunk's
# operands are copied into another order and then read once, and should not
# leave the second-level cache in between. CPUs of the last ten years have half
# a MiB to two of it for a core.
#
# Bytes of the copies of one chunk for a product of matrices, which one core
# makes. Larger chunks gain nothing: the inner dimension is in the thousands.
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
  pads: onednn.Pads
  precision: Any  # Of the products, as `jax.lax.Precision` or None.

  def apply(self, x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
      *(x, kernel, self.strides, self.pads),
      dimension_numbers=_LAYOUT,
      precision=self.precision,
    )


_Form = Callable[[_Geometry, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class _Operation:
  """One of the three, in the forms that the platforms take."""

  # Of x (the input), k (the kernel) and g (the output or its gradient).
  operands: str
  result: str
  cpu: _Form
  standard: _Form  # The same elsewhere.

  @property
  def sharding_rule(self) -> str:
    """Which dimensions are the same; devices may share out `n`, the images."""
    x, k, g = (_DIMENSIONS[name] for name in (*self.operands, self.result))
    return f"{x}, {k} -> {g}"

  @property
  def sums_over_images(self) -> bool:
    return self.result == "k"


_DIMENSIONS = {"x": "n h w c", "k": "k l c d", "g": "n p q d"}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply(
  operation: _Operation, geometry: _Geometry, a: Array, b: Array
) -> Array:
  standard = functools.partial(operation.standard, geometry)
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.manual_axes:
    cpu = _partitioned(operation, geometry)
  else:
    # In a `shard_map` JAX refuses custom partitioning. Where the batch may be
    # divided over an axis that is left to the partitioner, it is given what it
    # knows.
    left = (n for axis, n in mesh.shape.items() if axis not in mesh.manual_axes)
    is_local = math.prod(left) == 1
    cpu = functools.partial(operation.cpu, geometry) if is_local else standard
  return lax.platform_dependent(a, b, cpu=cpu, default=standard)


def _forward(operation, geometry, a, b):
  return _apply(operation, geometry, a, b), (a, b)


def _backward(operation, geometry, operands, cotangent):
  """The three are bilinear and each the derivative of the others."""
  arrays = dict(zip(operation.operands, operands, strict=True))
  arrays[operation.result] = cotangent
  return tuple(
    _apply(each, geometry, *map(arrays.get, each.operands))
    for each in [_OPERATIONS[name] for name in operation.operands]
  )


_apply.defvjp(_forward, _backward)


def _transpose(function: Callable[[Array], Array], shape, g: Array) -> Array:
  """What the transpose of a linear function of such an array makes of g."""
  argument = jax.ShapeDtypeStruct(shape, g.dtype)
  return jax.linear_transpose(function, argument)(g)[0]


def _standard_input_gradient(
  geometry: _Geometry, g: Array, kernel: Array
) -> Array:
  shape = (g.shape[0], *geometry.input_hw, kernel.shape[2])
  return _transpose(lambda x: geometry.apply(x, kernel), shape, g)


def _standard_weight_gradient(geometry: _Geometry, x: Array, g: Array) -> Array:
  shape = (*geometry.kernel_hw, x.shape[-1], g.shape[-1])
  return _transpose(lambda kernel: geometry.apply(x, kernel), shape, g)


def _cpu_conv(geometry: _Geometry, x: Array, kernel: Array) -> Array:
  if not onednn.can_convolve(x.dtype):
    return geometry.apply(x, kernel)
  return onednn.convolve(x, kernel, geometry.strides, geometry.pads)


def _cpu_input_gradient(geometry: _Geometry, g: Array, kernel: Array) -> Array:
  """Convolutions of g with the kernel, turned by 180 degrees.

  Input rows that are a stride apart meet the same rows of the kernel, and so
  do columns. Each such phase of the result is a convolution with its part of
  the kernel, so that no product with an inserted zero is computed.
  """
  if not onednn.can_convolve(g.dtype):
    return _standard_input_gradient(geometry, g, kernel)
  (sh, sw), (height, width) = geometry.strides, geometry.input_hw
  kernel = kernel.swapaxes(2, 3)

  def phase(*starts: int) -> Array:
    """The rows and columns of the result from `starts` on, by strides."""
    firsts, pads = [], []
    for start, size, k, stride, (before, _), out in zip(
      *(starts, geometry.input_hw, geometry.kernel_hw),
      *(geometry.strides, geometry.pads, g.shape[1:3]),
      strict=True,
    ):
      # The first element of the kernel that takes part, and how many do.
      first = (start + before) % stride
      taps = -(-(k - first) // stride)
      pad = taps - 1 - (start + before - first) // stride
      firsts.append(first)
      # Which gives ceil(size / stride) elements.
      pads.append((pad, -(-size // stride) - out - pad + taps - 1))
    i, j = firsts
    part = jnp.flip(kernel[i::sh, j::sw], (0, 1))
    if not part.size:
      shape = -(-height // sh), -(-width // sw)
      return jnp.zeros((g.shape[0], *shape, kernel.shape[3]), g.dtype)
    return onednn.convolve(g, part, (1, 1), (pads[0], pads[1]))

  if (sh, sw) == (1, 1):
    return phase(0, 0)
  rows = [
    jnp.stack([phase(row, column) for column in range(sw)], 3)
    for row in range(sh)
  ]
  phases = jnp.stack(rows, 2)
  n, p, _, q, _, c = phases.shape
  return phases.reshape(n, p * sh, q * sw, c)[:, :height, :width]


def _cpu_weight_gradient(geometry: _Geometry, x: Array, g: Array) -> Array:
  # A function that XLA does not inline finds its operands in memory. Inlined,
  # what computes x would be computed again in the order that a copy needs.
  with set_xla_metadata(inlineable="false"):
    return _chunked_weight_gradient(geometry, x, g)


@functools.partial(jax.jit, static_argnums=0)
def _chunked_weight_gradient(geometry: _Geometry, x: Array, g: Array) -> Array:
  images = x.shape[0]
  shape = (*geometry.kernel_hw, x.shape[-1], g.shape[-1])
  if not (x.size and g.size):
    return jnp.zeros(shape, x.dtype)
  if onednn.can_convolve(x.dtype) and geometry.kernel_hw != (1, 1):
    per_image = (x.size + g.size) // images * x.dtype.itemsize
    size = max(1, _CONVOLVED_BYTES // per_image)
    form = _convolved_contribution
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


def _convolved_contribution(geometry: _Geometry, x: Array, g: Array) -> Array:
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


def _product_chunk_size(geometry: _Geometry, x: Array, g: Array) -> int:
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


def _product_contribution(geometry: _Geometry, x: Array, g: Array) -> Array:
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
    x = onednn.pad(x, geometry.pads)
  if (sh, sw) == (1, 1) != (kh, kw):
    # Row shifts on one side, column shifts on the other: kh * kw products of
    # one pixel each from kh + kw copies of it.
    width = q + kw - 1
    rows = [x[:, i : i + p, :width] for i in range(kh)]
    wide = onednn.pad(g, ((0, 0), (kw - 1, kw - 1)))
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


# By their results.
_OPERATIONS = {
  "g": _Operation("xk", "g", _cpu_conv, _Geometry.apply),
  "x": _Operation("gk", "x", _cpu_input_gradient, _standard_input_gradient),
  "k": _Operation("xg", "k", _cpu_weight_gradient, _standard_weight_gradient),
}


@functools.cache
def _partitioned(operation: _Operation, geometry: _Geometry):
  """The CPU form on a batch that may be sharded: each device its own part.

  The partitioner knows neither oneDNN's convolution nor that a loop over
  chunks of the batch could be split; it would gather the whole batch.
  """
  local = functools.partial(operation.cpu, geometry)
  partitioned = custom_partitioning(local)
  sums, whole = operation.sums_over_images, PartitionSpec()

  def batch_spec(arg_shapes) -> PartitionSpec:
    spec = arg_shapes[0].sharding.spec
    return PartitionSpec(spec[0] if len(spec) else None)

  def infer_sharding(mesh, arg_shapes, result_shape):
    return NamedSharding(mesh, whole if sums else batch_spec(arg_shapes))

  def partition(mesh, arg_shapes, result_shape):
    (axis,) = batch = batch_spec(arg_shapes)

    def lower(a, b):
      part = local(a, b)
      return lax.psum(part, axis) if sums and axis is not None else part

    result = infer_sharding(mesh, arg_shapes, result_shape)
    in_specs = batch, batch if sums else whole
    in_shardings = tuple(NamedSharding(mesh, spec) for spec in in_specs)
    return mesh, lower, result, in_shardings

  rule = operation.sharding_rule
  partitioned.def_partition(
    partition,
    infer_sharding_from_operands=infer_sharding,
    sharding_rule=rule,
    reduction_factors=("n",) if sums else (),
    # All but the images, in the order of the rule.
    need_replication_factors=tuple(dict.fromkeys(re.findall("[a-mo-z]", rule))),
  )
  call = custom_vmap(partitioned)

  @call.def_vmap
  def _(axis_size, in_batched, a, b):
    axes = tuple(0 if batched else None for batched in in_batched)
    return jax.vmap(local, in_axes=axes)(a, b), True

  return call


def conv_general_dilated(
  lhs: Array,
  rhs: Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  precision: Any = None,
) -> Array:
  """`jax.lax.conv_general_dilated` in this module's forms.

  For `flax.linen.Conv(conv_general_dilated=...)`. Dilated and grouped
  convolutions, and others than two-dimensional NHWC ones, are passed on to
  JAX as they are. Reverse-mode derivatives of any order, `vmap` and batches
  that are sharded over devices work; forward mode does not (JAX says so).

  All arguments are as for JAX: of float[N, H, W, C] and float[KH, KW, C, D] it
  makes float[N, H', W', D]. oneDNN always computes in float32.
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
      *(lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation),
      *(dimension_numbers, feature_group_count),
      precision=precision,
    )
  input_hw, kernel_hw = lhs.shape[1:3], rhs.shape[:2]
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(input_hw, kernel_hw, window_strides, padding)
  rows, columns = ((int(before), int(after)) for before, after in padding)
  strides = tuple(map(int, window_strides))
  geometry = _Geometry(input_hw, kernel_hw, strides, (rows, columns), precision)
  return _apply(_OPERATIONS["g"], geometry, lhs, rhs)
