"""oneDNN's convolution, which jaxlib contains but XLA does not use by itself.

XLA has an operation for it on CPUs. The compiler inserts this operation only
with build flags that the published jaxlib lacks, but the operation itself is
there. Its interface is not stable, so it is used only with the jaxlib version
named here, for which tests compare it with XLA. A program that contains it
cannot be serialised: it cannot be exported for CPUs or kept in the persistent
compilation cache.
"""

import functools
import json
import os
import pathlib
import platform
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxlib import version as jaxlib_version

# Set this to False, before anything is traced, to use XLA's own convolutions.
enabled = True

HW = tuple[int, ...]  # For rows, then for columns.
# Numbers of zeros (before, after), for rows, then for columns; may be negative.
Pads = Sequence[tuple[int, int]]


@functools.cache
def _has_bfloat16() -> bool:
  """Whether the processor multiplies bfloat16 in hardware."""
  try:
    flags = set(pathlib.Path("/proc/cpuinfo").read_text().split())
  except OSError:
    return False
  return bool(flags & {"avx512_bf16", "amx_bf16"})


def can_convolve(dtype: Any) -> bool:
  """Whether `convolve` is enabled and works on this machine for this dtype."""
  # Another jaxlib may crash if it cannot read the operation's configuration.
  is_known = jaxlib_version.__version__ == "0.10.2"
  system = sys.platform, platform.machine()
  has_onednn = is_known and system == ("linux", "x86_64")
  limits = [os.environ.get(f"{n}_MAX_CPU_ISA", "") for n in ("ONEDNN", "DNNL")]
  # If limited to less than AVX-512, oneDNN ends the process for bfloat16.
  is_limited = any(re.fullmatch("AVX(2.*)?", limit.upper()) for limit in limits)
  has_bfloat16 = _has_bfloat16() and not is_limited
  is_fast = dtype == jnp.float32 or (dtype == jnp.bfloat16 and has_bfloat16)
  # oneDNN's kernels for processors without AVX deadlock.
  deadlocks = "SSE41" in "".join(limits).upper()
  return enabled and has_onednn and is_fast and not deadlocks


def pad(x: Array, pads: Pads) -> Array:
  """Pads NHWC images with zeros; negative pads cut rows and columns off."""
  config = [(*each, 0) for each in ((0, 0), *pads, (0, 0))]
  return lax.pad(x, jnp.zeros((), x.dtype), config)


def convolve(
  x: Array,
  kernel: Array,
  strides: HW,
  pads: Pads,
  dilation: HW = (1, 1),
  dtype: Any = None,
) -> Array:
  """The convolution of NHWC images with an HWIO kernel, on a CPU.

  It has no derivative and no partitioning rule. Negative pads cut rows and
  columns off. Sums are float32. The result has `dtype`, by default the images'.
  """
  dtype = dtype or x.dtype
  kernel_hw = kernel.shape[:2]
  out_hw = (
    max(0, (size + before + after - (k - 1) * gap - 1) // stride + 1)
    for size, k, gap, stride, (before, after) in zip(
      x.shape[1:3], kernel_hw, dilation, strides, pads, strict=True
    )
  )
  shape = (x.shape[0], *out_hw, kernel.shape[3])
  # An empty sum is zero; oneDNN is not called for empty operands.
  if 0 in (*shape, *x.shape, *kernel.shape):
    return jnp.zeros(shape, dtype)
  if any(min(each) < 0 for each in pads):
    # Pads and cuts are one step: a cut alone may be larger than the image.
    x, pads = pad(x, pads), ((0, 0), (0, 0))
  image_axes = {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}
  image_layout = {"dims": 4, "data": image_axes}
  kernel_axes = {"input_feature_dim": 2, "output_feature_dim": 3}
  kernel_layout = kernel_axes | {"spatial_dims": [0, 1], "shape": kernel_hw}
  convolution = {
    "dims": 4,
    "input": image_layout,
    "kernel": {"dims": 4, "filter": kernel_layout},
    "output": image_layout,
    "window": {
      "size": kernel_hw,
      "strides": strides,
      "pad_left": [before for before, _ in pads],
      "pad_right": [after for _, after in pads],
      "window_dilations": dilation,
    },
    "feature_groups": 1,
  }
  return jax.ffi.ffi_call(
    "__onednn$convolution",
    jax.ShapeDtypeStruct(shape, dtype),
    custom_call_api_version=2,
    legacy_backend_config=json.dumps({"onednn_conv_config": convolution}),
    vmap_method="sequential",
  )(x, kernel)
