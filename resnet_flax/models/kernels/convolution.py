"""Convolution in a fast form for each platform.

XLA's convolution is fast on TPUs and GPUs, but on CPUs oneDNN's is faster. If
jaxlib has oneDNN, its forward convolution computes the output, input gradient
and weight gradient on CPUs: in float32, and in bfloat16 if the processor has
it. Only the weight gradient of a 1x1 kernel is a matrix product. Without
oneDNN, the weight gradient is a sum of products of matrices that stay in the
cache, and XLA does the rest. JAX chooses the form when it lowers a program for
a platform. In a `shard_map` whose batch XLA may still divide, XLA does it all.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import NamedSharding, PartitionSpec

from resnet_flax.models.kernels import onednn

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_NUMBERS = lax.conv_dimension_numbers((1,) * 4, (1,) * 4, _LAYOUT)

# The weight gradient is a sum over images, computed in chunks. A chunk's
# operands are copied into another order and then read once. In between they
# should stay in the second-level cache: 0.5 to 2 MiB per core in CPUs of the
# last ten years.
_PRODUCT_BYTES = 1 << 19  # Copies for a matrix product; one core makes them.
_CONVOLVED_BYTES = 1 << 21  # Operands of oneDNN; its threads share them.


class _Geometry(NamedTuple):
  """The static part of a convolution, NHWC by HWIO."""

  input_hw: onednn.HW
  kernel_hw: onednn.HW
  strides: onednn.HW
  pads: onednn.Pads

  def apply(self, x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
      x, kernel, self.strides, self.pads, dimension_numbers=_LAYOUT
    )


# Three bilinear operations, by their results: two of x (input), k (kernel) and
# g (output or its gradient) give the third. Each is a derivative of the others.
_OPERANDS = {"g": "xk", "x": "gk", "k": "xg"}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply(result: str, geometry: _Geometry, a: Array, b: Array) -> Array:
  cpu = functools.partial(_CPU[result], geometry)
  standard = functools.partial(_STANDARD[result], geometry)
  mesh = jax.sharding.get_abstract_mesh()
  auto = [n for axis, n in mesh.shape.items() if axis not in mesh.manual_axes]
  if not mesh.manual_axes:
    cpu = _partitioned(result, geometry)
  # A `shard_map` takes no custom partitioning. If the partitioner may still
  # divide the batch over an axis, XLA's form is used, which it can divide.
  elif max(auto, default=1) > 1:
    cpu = standard
  return lax.platform_dependent(a, b, cpu=cpu, default=standard)


def _forward(result, geometry, a, b):
  return _apply(result, geometry, a, b), (a, b)


def _backward(result, geometry, operands, cotangent):
  arrays = dict(zip(_OPERANDS[result], operands, strict=True))
  arrays[result] = cotangent
  return tuple(
    _apply(name, geometry, *map(arrays.get, _OPERANDS[name]))
    for name in _OPERANDS[result]
  )


_apply.defvjp(_forward, _backward)


def _input_gradient(geometry: _Geometry, g: Array, kernel: Array) -> Array:
  shape = (g.shape[0], *geometry.input_hw, kernel.shape[2])
  x = jax.ShapeDtypeStruct(shape, g.dtype)
  return jax.linear_transpose(lambda x: geometry.apply(x, kernel), x)(g)[0]


def _weight_gradient(geometry: _Geometry, x: Array, g: Array) -> Array:
  shape = (*geometry.kernel_hw, x.shape[-1], g.shape[-1])
  kernel = jax.ShapeDtypeStruct(shape, g.dtype)
  return jax.linear_transpose(lambda k: geometry.apply(x, k), kernel)(g)[0]


def _cpu_conv(geometry: _Geometry, x: Array, kernel: Array) -> Array:
  if onednn.can_convolve(x.dtype):
    return onednn.convolve(x, kernel, geometry.strides, geometry.pads)
  return geometry.apply(x, kernel)


def _cpu_input_gradient(geometry: _Geometry, g: Array, kernel: Array) -> Array:
  """Convolves g with the kernel, turned by 180 degrees."""
  if not onednn.can_convolve(g.dtype):
    return _input_gradient(geometry, g, kernel)
  (sh, sw), (height, width) = geometry.strides, geometry.input_hw
  kernel = kernel.swapaxes(2, 3)

  # Input rows that are a stride apart meet the same rows of the kernel, and so
  # do columns. Each such phase of the result is a convolution with its part of
  # the kernel, so that no product with an inserted zero is computed.
  def phase(*starts: int) -> Array:
    firsts, pads = [], []
    sizes = geometry.input_hw, geometry.kernel_hw, g.shape[1:3]
    for start, size, k, out, stride, (before, _) in zip(
      starts, *sizes, geometry.strides, geometry.pads, strict=True
    ):
      # The phase's `first` kernel element, and the number of its elements.
      shift, first = divmod(start + before, stride)
      taps = -(-(k - first) // stride)
      pad = taps - 1 - shift
      firsts.append(first)
      # These pads give ceil(size / stride) elements.
      pads.append((pad, -(-size // stride) - out - pad + taps - 1))
    part = kernel[firsts[0] :: sh, firsts[1] :: sw]
    return onednn.convolve(g, jnp.flip(part, (0, 1)), (1, 1), pads)

  if (sh, sw) == (1, 1):
    return phase(0, 0)
  phases = jnp.stack(
    [jnp.stack([phase(i, j) for j in range(sw)], 3) for i in range(sh)], 2
  )
  n, p, _, q, _, c = phases.shape
  return phases.reshape(n, p * sh, q * sw, c)[:, :height, :width]


def _cpu_weight_gradient(geometry: _Geometry, x: Array, g: Array) -> Array:
  # XLA does not inline this function, so its operands are in memory. Otherwise
  # XLA would compute x again, in the order that a copy needs.
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
    function, size = _convolved_contribution, _CONVOLVED_BYTES // per_image
  else:
    function, size = _product_contribution, _product_chunk_size(geometry, x, g)
  contribution, size = functools.partial(function, geometry), max(1, size)
  if size >= images:
    return contribution(x, g).astype(x.dtype)
  chunks = images // size
  whole = chunks * size
  total, _ = lax.scan(
    lambda total, chunk: (total + contribution(*chunk), None),
    jnp.zeros(shape, jnp.promote_types(x.dtype, jnp.float32)),
    [a[:whole].reshape(chunks, size, *a.shape[1:]) for a in (x, g)],
  )
  if whole < images:
    total = total + contribution(x[whole:], g[whole:])
  return total.astype(x.dtype)


def _convolved_contribution(geometry: _Geometry, x: Array, g: Array) -> Array:
  """The weight gradient of some images as one forward convolution."""
  # Images take the place of input channels, which are summed over, and g takes
  # the place of the kernel. In the width, a pixel's C channels are neighbours,
  # so a step of the kernel to the right is a step of C elements:
  #   dW[i, j * C + c, d] = sum_npq X[p * SH + i, (q * SW + j) * C + c, n]
  #                                 * G[p, q, n, d]
  (kh, kw), (sh, sw) = geometry.kernel_hw, geometry.strides
  (top, _), (left, _) = geometry.pads
  (n, h, w, c), (_, p, q, d) = x.shape, g.shape
  # Padding after the input; negative where strides skip its last elements.
  bottom = (p - 1) * sh + kh - h - top
  right = (q - 1) * sw + kw - w - left
  result = onednn.convolve(
    x.reshape(n, h * w * c).T.reshape(1, h, w * c, n),
    g.transpose(1, 2, 0, 3),
    (1, 1),
    ((top, bottom), (left * c, right * c)),
    (sh, sw * c),
    jnp.float32,
  )
  return result.reshape(kh, kw, c, d)


def _product_chunk_size(geometry: _Geometry, x: Array, g: Array) -> int:
  """The number of images in a chunk whose copies fit in `_PRODUCT_BYTES`."""
  (kh, kw), (_, p, q, d), c = geometry.kernel_hw, g.shape, x.shape[-1]
  if geometry.kernel_hw == (1, 1):
    return x.shape[0]  # Nothing is copied, so nothing must stay in the cache.
  stacked = geometry.strides == (1, 1)
  per_pixel = kh * c + kw * d if stacked else kh * kw * c + d
  per_image = p * (q + kw - 1 if stacked else q) * per_pixel * x.dtype.itemsize
  # Reading and writing the sum must not be most of a chunk's traffic.
  sum_bytes = kh * kw * c * d * x.dtype.itemsize
  return max(_PRODUCT_BYTES, sum_bytes) // per_image


def _product_contribution(geometry: _Geometry, x: Array, g: Array) -> Array:
  """The weight gradient of some images as one matrix product."""
  (kh, kw), (sh, sw) = geometry.kernel_hw, geometry.strides
  (_, p, q, d), c = g.shape, x.shape[-1]
  product = functools.partial(
    lax.dot_general,
    dimension_numbers=(((0,), (0,)), ((), ())),
    preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
  )
  if geometry.pads != ((0, 0), (0, 0)):
    x = onednn.pad(x, geometry.pads)
  if (sh, sw) == (1, 1) != (kh, kw):
    # Row shifts on one side, column shifts on the other: a pixel has kh * kw
    # products but only kh + kw copies.
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


_CPU = {"g": _cpu_conv, "x": _cpu_input_gradient, "k": _cpu_weight_gradient}
# The forms for other platforms.
_STANDARD = {"g": _Geometry.apply, "x": _input_gradient, "k": _weight_gradient}


@functools.cache
def _partitioned(result: str, geometry: _Geometry):
  """The CPU form for a sharded batch: each device computes its own part."""
  # The partitioner can divide neither oneDNN's convolution nor a loop over
  # chunks of the batch, so it would gather the whole batch.
  local = functools.partial(_CPU[result], geometry)
  partitioned = custom_partitioning(local)
  sums_over_images = result == "k"

  def partition(mesh, arg_shapes, result_shape):
    spec = arg_shapes[0].sharding.spec
    axis = spec[0] if len(spec) else None
    batch = NamedSharding(mesh, PartitionSpec(axis))
    replicated = NamedSharding(mesh, PartitionSpec())
    if not sums_over_images:
      return mesh, local, batch, (batch, replicated)

    def total(a, b):
      return lax.psum(local(a, b), axis)

    return mesh, local if axis is None else total, replicated, (batch, batch)

  dimensions = {"x": "n h w c", "k": "k l c d", "g": "n p q d"}
  a, b = map(dimensions.get, _OPERANDS[result])
  # Equal letters are equal dimensions; devices may divide `n`, the images.
  rule = f"{a}, {b} -> {dimensions[result]}"
  partitioned.def_partition(
    partition,
    infer_sharding_from_operands=lambda *args: partition(*args)[2],
    sharding_rule=rule,
    reduction_factors=("n",) if sums_over_images else (),
    # All dimensions except the images, in the rule's order.
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
  *,
  dimension_numbers: Any = None,
  **options: Any,
) -> Array:
  """`jax.lax.conv_general_dilated`, computed in the platform's form.

  Maps float[N, H, W, C] and float[KH, KW, C, D] to float[N, H', W', D]; other
  arguments are JAX's. JAX computes convolutions that are not two-dimensional
  NHWC, mix dtypes or set an option, such as a dilation, groups or a precision.
  Reverse-mode derivatives of any order, `vmap` and sharded batches work;
  forward mode raises a TypeError. oneDNN always sums in float32.
  """
  is_nhwc = dimension_numbers in (_LAYOUT, _NUMBERS)
  is_plain = all(value in (None, 1, (1, 1)) for value in options.values())
  if not (is_nhwc and is_plain and lhs.dtype == rhs.dtype):
    return lax.conv_general_dilated(
      *(lhs, rhs, window_strides, padding),
      dimension_numbers=dimension_numbers,
      **options,
    )
  input_hw, kernel_hw = lhs.shape[1:3], rhs.shape[:2]
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(input_hw, kernel_hw, window_strides, padding)
  pads = tuple((int(before), int(after)) for before, after in padding)
  strides = tuple(map(int, window_strides))
  geometry = _Geometry(input_hw, kernel_hw, strides, pads)
  return _apply("g", geometry, lhs, rhs)
