"""Against JAX's own convolution: values, derivatives, lowering, sharding."""

import contextlib
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from jax import lax

from resnet_flax.models.kernels import convolution, onednn
from resnet_flax.parallel import mesh as mesh_lib, transfer

LAYOUT = ("NHWC", "HWIO", "NHWC")


def plain(x, kernel, strides, padding):
  return lax.conv_general_dilated(
    x, kernel, strides, padding, dimension_numbers=LAYOUT
  )


def ours(x, kernel, strides, padding):
  return convolution.conv_general_dilated(
    x, kernel, strides, padding, dimension_numbers=LAYOUT
  )


def normal(shape, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), dtype)


def he_normal(shape, dtype=np.float32):
  return normal(shape, dtype, seed=1) / np.sqrt(np.prod(shape[:3])).astype(
    dtype
  )


def derivatives(conv, x, kernel, strides, padding):
  """The output, and both gradients of a smooth function of the output."""

  def loss(x, kernel):
    y = conv(x, kernel, strides, padding)
    return jnp.sum(jnp.sin(y.astype(jnp.promote_types(y.dtype, np.float32)))), y

  grads, y = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, kernel)
  return y, *grads


def assert_close(ours, theirs, tolerance=1e-5):
  ours, theirs = (np.asarray(a, np.float64) for a in (ours, theirs))
  assert ours.shape == theirs.shape
  largest = np.abs(theirs).max(initial=1e-30)
  assert np.abs(ours - theirs).max(initial=0) <= tolerance * largest


@st.composite
def convolutions(draw):
  size = draw(st.sampled_from([1, 2, 3, 5, 7, 11]))
  height, width = (draw(st.integers(1, 18)) for _ in range(2))
  stride = st.sampled_from([1, 2, 3, 4])
  pads = st.integers(0, size)
  padding = draw(
    st.sampled_from(["SAME", "VALID"])
    | st.tuples(st.tuples(pads, pads), st.tuples(pads, pads))
  )
  images = draw(st.integers(1, 9))
  channels, filters = (draw(st.integers(1, 20)) for _ in range(2))
  x = normal((images, height, width, channels))
  kernel = he_normal((size, size, channels, filters))
  return x, kernel, (draw(stride), draw(stride)), padding


@contextlib.contextmanager
def patched(module, **values):
  """Other values for a module's constants, which traced functions know."""
  with pytest.MonkeyPatch.context() as patch:
    for name, value in values.items():
      patch.setattr(module, name, value)
    forget_traced_functions()
    yield
  forget_traced_functions()


def forget_traced_functions():
  convolution._partitioned.cache_clear()
  convolution._chunked_weight_gradient.clear_cache()


@pytest.fixture(params=["onednn", "no_onednn"], autouse=True)
def onednn_or_not(request):
  """Every test with oneDNN's convolution, where it is, and without it."""
  if request.param == "onednn":
    with patched(onednn, enabled=True):
      if not onednn.can_convolve(jnp.dtype(np.float32)):
        pytest.skip("this jaxlib is not known to bring oneDNN")
      yield True
  else:
    with patched(onednn, enabled=False):
      yield False


@settings(
  deadline=None,
  derandomize=True,
  max_examples=10,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(convolutions(), st.sampled_from([1, 1 << 12, 1 << 19]))
def test_any_shape(case, cache_bytes):
  """Also with chunks of one image, and chunks that do not divide the batch."""
  with patched(
    convolution, _PRODUCT_BYTES=cache_bytes, _CONVOLVED_BYTES=cache_bytes
  ):
    for a, b in zip(
      derivatives(ours, *case), derivatives(plain, *case), strict=True
    ):
      assert_close(a, b)


@pytest.mark.parametrize(
  ("x", "kernel", "strides"),
  [
    ((130, 32, 32, 16), (3, 3, 16, 16), (1, 1)),
    ((33, 32, 32, 3), (3, 3, 3, 16), (1, 1)),
    ((40, 16, 16, 32), (3, 3, 32, 64), (2, 2)),
    ((3, 7, 7, 512), (3, 3, 512, 512), (1, 1)),
    ((3, 28, 28, 3), (11, 11, 3, 64), (4, 4)),
    ((16, 32, 32, 16), (1, 1, 16, 64), (2, 2)),
  ],
)
def test_shapes_of_real_networks(x, kernel, strides):
  case = normal(x), he_normal(kernel), strides, "SAME"
  for a, b in zip(
    derivatives(ours, *case), derivatives(plain, *case), strict=True
  ):
    assert_close(a, b)


@pytest.mark.parametrize(
  ("x", "kernel", "strides", "padding"),
  [
    ((2, 3, 3, 2), (3, 3, 2, 4), (4, 4), ((3, 0), (3, 0))),
    ((2, 2, 2, 2), (2, 2, 2, 4), (8, 8), ((6, 0), (6, 0))),
    ((2, 7, 9, 2), (3, 3, 2, 4), (2, 1), ((-1, 2), (1, -2))),
    ((2, 1, 1, 2), (5, 5, 2, 4), (1, 1), "VALID"),
    ((2, 9, 1, 2), (3, 3, 2, 4), (1, 1), "VALID"),
    ((0, 8, 8, 2), (3, 3, 2, 4), (1, 1), "SAME"),
  ],
)
def test_windows_that_see_little_or_nothing(x, kernel, strides, padding):
  case = normal(x), normal(kernel, seed=1), strides, padding
  for a, b in zip(
    derivatives(ours, *case), derivatives(plain, *case), strict=True
  ):
    assert_close(a, b)


def test_padding_of_pytorch_and_of_tensorflow():
  x, kernel = normal((2, 8, 8, 3)), normal((3, 3, 3, 4))
  for padding in ("SAME", ((0, 1), (0, 1)), ((1, 1), (1, 1))):
    case = x, kernel, (2, 2), padding
    for a, b in zip(
      derivatives(ours, *case), derivatives(plain, *case), strict=True
    ):
      assert_close(a, b)


@pytest.mark.parametrize(
  ("dtype", "tolerance"), [(jnp.bfloat16, 2e-2), (jnp.float64, 1e-12)]
)
def test_dtypes(dtype, tolerance):
  with jax.enable_x64(True):
    x, kernel = normal((9, 8, 8, 6), dtype), normal((3, 3, 6, 4), dtype, seed=1)
    mine = derivatives(ours, x, kernel, (1, 1), "SAME")
    theirs = derivatives(plain, x, kernel, (1, 1), "SAME")
  for a, b in zip(mine, theirs, strict=True):
    assert a.dtype == b.dtype == dtype
    assert_close(a, b, tolerance)


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_kernels_that_wait_for_ever_are_not_used(name, monkeypatch):
  monkeypatch.setenv(name, "sse41")
  assert not onednn.can_convolve(jnp.float32)


@pytest.mark.parametrize(
  ("limit", "expected"),
  [("avx", False), ("AVX2", False), ("AVX2_VNNI_2", False), ("", True)],
)
def test_a_limit_that_takes_bfloat16_away(limit, expected, monkeypatch):
  """Otherwise oneDNN would end the process."""
  monkeypatch.setattr(onednn, "_has_bfloat16", lambda: True)
  monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
  is_there = onednn.can_convolve(jnp.float32)
  assert onednn.can_convolve(jnp.bfloat16) == (expected and is_there)


def test_bfloat16_is_float32_rounded():
  """Sums are float32; only operands and results are rounded."""
  if not onednn.can_convolve(jnp.bfloat16):
    pytest.skip("this processor has no bfloat16")
  # More images than one chunk of the weight gradient, whose sum is float32 too.
  x, kernel = normal((600, 16, 16, 16)), he_normal((3, 3, 16, 16))
  half = [a.astype(jnp.bfloat16) for a in (x, kernel)]
  mine = derivatives(ours, *half, (1, 1), "SAME")
  same = [a.astype(jnp.float32) for a in half]
  theirs = derivatives(plain, *same, (1, 1), "SAME")
  for a, b in zip(mine, theirs, strict=True):
    assert a.dtype == jnp.bfloat16
    # 2**-9 for the result and for the gradient that comes in, which is that of
    # a rounded result.
    assert_close(a, b, 2**-6)


@pytest.mark.parametrize("argnum", [0, 1])
def test_gradient_of_a_gradient(argnum):
  x, kernel = normal((5, 9, 8, 3)), normal((3, 3, 3, 4), seed=1)

  def second(conv):
    def first(x, kernel):
      y = conv(x, kernel, (2, 1), "SAME")
      return jnp.sum(jnp.sin(y))

    def norm(*operands):
      grads = jax.grad(first, (0, 1))(*operands)
      return sum(jnp.sum(g**2) for g in grads)

    return jax.jit(jax.grad(norm, argnum))(x, kernel)

  assert_close(second(ours), second(plain))


@pytest.mark.parametrize("in_axes", [(0, 0), (None, 0), (0, None)])
def test_vmap(in_axes):
  x, kernel = normal((3, 9, 8, 8, 4)), normal((3, 3, 3, 4, 5), seed=1)
  x, kernel = (
    a if axis == 0 else a[0]
    for a, axis in zip((x, kernel), in_axes, strict=True)
  )

  def grads(conv):
    def loss(x, kernel):
      return jnp.sum(jnp.sin(conv(x, kernel, (1, 1), "SAME")))

    mapped = jax.vmap(jax.grad(loss, (0, 1)), in_axes=in_axes)
    return jax.jit(mapped)(x, kernel)

  for a, b in zip(grads(ours), grads(plain), strict=True):
    assert_close(a, b)


def test_forward_mode_is_refused_by_jax():
  x, kernel = normal((2, 4, 4, 3)), normal((3, 3, 3, 4))
  conv = functools.partial(ours, strides=(1, 1), padding="SAME")
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(conv, (x, kernel), (x, kernel))


@pytest.mark.parametrize(
  "arguments",
  [
    {"feature_group_count": 4},
    {"rhs_dilation": (2, 2)},
    {"lhs_dilation": (2, 2)},
  ],
)
def test_others_are_passed_on(arguments):
  groups = arguments.get("feature_group_count", 1)
  x, kernel = normal((2, 9, 9, 4)), normal((3, 3, 4 // groups, 8))
  common = {"dimension_numbers": LAYOUT, **arguments}
  mine = convolution.conv_general_dilated(
    x, kernel, (1, 1), ((0, 0), (0, 0)), **common
  )
  theirs = lax.conv_general_dilated(
    x, kernel, (1, 1), ((0, 0), (0, 0)), **common
  )
  np.testing.assert_array_equal(mine, theirs)


def test_other_layouts_are_passed_on():
  """Without a layout, JAX's is NCHW."""
  operands = normal((2, 4, 9, 9)), normal((8, 4, 3, 3)), (1, 1), "SAME"
  np.testing.assert_array_equal(
    convolution.conv_general_dilated(*operands),
    lax.conv_general_dilated(*operands),
  )


def test_in_flax_it_is_nn_conv():
  x = normal((4, 8, 8, 3))
  own = nn.Conv(
    5, (3, 3), conv_general_dilated=convolution.conv_general_dilated
  )
  stock = nn.Conv(5, (3, 3))
  variables = stock.init(jax.random.key(0), x)
  jax.tree.map(
    np.testing.assert_array_equal,
    own.init(jax.random.key(0), x),
    variables,
  )
  assert_close(own.apply(variables, x), stock.apply(variables, x))


def loss_gradients(conv):
  def loss(x, kernel):
    return jnp.sum(jnp.sin(conv(x, kernel, (1, 1), "SAME")))

  return jax.jit(jax.grad(loss, (0, 1)))


def test_sharded_batch_is_not_gathered():
  mesh = mesh_lib.create_mesh()
  x = transfer.put(
    normal((64, 8, 8, 4)), mesh_lib.sharding(mesh, mesh_lib.DATA)
  )
  kernel = jax.device_put(normal((3, 3, 4, 5), seed=1), mesh_lib.sharding(mesh))
  text = loss_gradients(ours).lower(x, kernel).compile().as_text()
  assert "all-gather" not in text
  assert len(re.findall(r"all-reduce(?:-start)?\(", text)) == 1
  mine, theirs = (loss_gradients(conv)(x, kernel) for conv in (ours, plain))
  assert mine[0].sharding == mesh_lib.sharding(mesh, mesh_lib.DATA)
  for a, b in zip(mine, theirs, strict=True):
    assert_close(a, b)


def count(text, *names):
  return tuple(len(re.findall(rf"stablehlo\.{n}\b", text)) for n in names)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_get_three_convolutions(platform):
  shapes = (
    jax.ShapeDtypeStruct((64, 32, 32, 16), jnp.float32),
    jax.ShapeDtypeStruct((3, 3, 16, 16), jnp.float32),
  )
  export = jax.export.export(loss_gradients(ours), platforms=[platform])
  text = export(*shapes).mlir_module()
  found = count(text, "convolution", "while", "dot_general", "custom_call")
  assert found == (3, 0, 0, 0)


def test_cpus_get_their_own(onednn_or_not):
  shapes = (
    jax.ShapeDtypeStruct((64, 32, 32, 16), jnp.float32),
    jax.ShapeDtypeStruct((3, 3, 16, 16), jnp.float32),
  )
  text = loss_gradients(ours).lower(*shapes).as_text()
  found = count(text, "convolution", "while", "dot_general")
  assert found == ((0, 1, 0) if onednn_or_not else (2, 1, 1))
  assert text.count("@__onednn$convolution") == (3 if onednn_or_not else 0)
