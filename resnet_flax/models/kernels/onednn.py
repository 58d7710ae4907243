"""oneDNN's convolution, which jaxlib brings and XLA does not use by itself.

XLA on CPUs has an operation for it, `__onednn$convolution`, which its compiler
puts in place of a convolution only in builds and with flags that the published
jaxlib does not have; the operation itself is there. It belongs to no stable
interface, so it is used only with the jaxlib versions named here, which the
tests compare it with, and XLA's own convolution everywhere else. A program that
contains it cannot be serialised: not exported for CPUs, and not kept in the
persistent compilation cache.
"""

import json
import math
import platform
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxlib import version as jaxlib_version

_TARGET = "__onednn$convolution"

# jaxlib versions whose operation reads the configuration below. Another one
# might end the process where it cannot.
TESTED_VERSIONS = ("0.10.2",)

_IS_THERE = (
  jaxlib_version.__version__ in TESTED_VERSIONS
  and sys.platform == "linux"
  and platform.machine() == "x86_64"
)

# Set to False to have XLA's own convolutions, before anything is traced.
enabled = True

Pads = tuple[tuple[int, int], tuple[int, int]]


def can_convolve(dtype: jnp.dtype) -> bool:
  """Whether `convolve` works here, and for this dtype."""
  return enabled and _IS_THERE and dtype == jnp.float32


def pad(x: Array, pads: Pads) -> Array:
  """NHWC images with zeros around them, or less where pads are negative."""
  config = ((before, after, 0) for before, after in ((0, 0), *pads, (0, 0)))
  return lax.pad(x, jnp.zeros((), x.dtype), tuple(config))


def convolve(
  x: Array,
  kernel: Array,
  strides: tuple[int, ...],
  pads: Pads,
  dilation: tuple[int, ...] = (1, 1),
) -> Array:
  """The convolution of NHWC images with an HWIO kernel, on a CPU.

  It has no derivative and no partitioning rule of its own. Where pads are
  negative, so many rows or columns are cut off.
  """
  if min(pads[0] + pads[1]) < 0:
    # All of it at once: a cut alone may be of more than there is.
    x, pads = pad(x, pads), ((0, 0), (0, 0))
  kernel_hw = kernel.shape[:2]
  out_hw = (
    max(0, (size + before + after - (k - 1) * gap - 1) // stride + 1)
    for size, k, gap, stride, (before, after) in zip(
      x.shape[1:3], kernel_hw, dilation, strides, pads, strict=True
    )
  )
  shape = (x.shape[0], *out_hw, kernel.shape[3])
  # An empty sum is zero; oneDNN is not asked about empty operands.
  if not (math.prod(shape) and x.size and kernel.size):
    return jnp.zeros(shape, x.dtype)
  images = {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}
  weights: dict[str, Any] = {"input_feature_dim": 2, "output_feature_dim": 3}
  weights |= {"spatial_dims": [0, 1], "shape": kernel_hw}
  convolution = {
    "dims": 4,
    "input": {"dims": 4, "data": images},
    "kernel": {"dims": 4, "filter": weights},
    "output": {"dims": 4, "data": images},
    "window": {
      "size": kernel_hw,
      "strides": strides,
      "pad_left": [before for before, _ in pads],
      "pad_right": [after for _, after in pads],
      "window_dilations": dilation,
    },
    "feature_groups": 1,
  }
  call = jax.ffi.ffi_call(
    _TARGET,
    jax.ShapeDtypeStruct(shape, x.dtype),
    custom_call_api_version=2,
    legacy_backend_config=json.dumps({"onednn_conv_config": convolution}),
    vmap_method="sequential",
  )
  return call(x, kernel)
