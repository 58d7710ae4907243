"""The layers that networks are built from, with the recipe's defaults."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from resnet_flax.models import convolution

he_normal = nn.initializers.he_normal()

PADDINGS = ("same", "symmetric")


def conv(
  num_filters: int,
  kernel_size: tuple[int, int],
  strides: int,
  *,
  padding: str,
  use_bias: bool,
  dtype: jnp.dtype,
  name: str,
) -> nn.Module:
  """A convolution with he_normal kernels.

  Args:
    num_filters: channels that come out.
    kernel_size: height and width, odd.
    strides: the same in both directions.
    padding: 'same' is TensorFlow's rule, (0, 1) for a 3x3 kernel at stride 2
      on an even size; 'symmetric' pads half the kernel on every side, as
      Caffe and PyTorch do.
    use_bias: whether a bias is added.
    dtype: what is computed in; parameters are float32.
    name: of the module.
  """
  pads: Any = "SAME"
  if padding == "symmetric":
    pads = [(size // 2, size // 2) for size in kernel_size]
  return nn.Conv(
    num_filters,
    kernel_size,
    strides,
    padding=pads,
    use_bias=use_bias,
    kernel_init=he_normal,
    dtype=dtype,
    conv_general_dilated=convolution.conv_general_dilated,
    name=name,
  )
