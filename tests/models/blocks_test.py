"""Each block against its figure in the paper, written out with `lax`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from resnet_flax.models import blocks, layers, other_blocks
from resnet_flax.models.kernels import batch_norm

EPSILON = 1e-3
CHANNELS = 4


@pytest.mark.parametrize("size", [8, 7])
def test_subsample_and_pad(size):
  x = np.random.default_rng(0).normal(size=(2, size, size, 3))
  y = blocks.subsample_and_pad(jnp.asarray(x), 2, 8)
  expected = np.zeros((2, -(-size // 2), -(-size // 2), 8))
  for row in range(expected.shape[1]):
    for column in range(expected.shape[2]):
      # Five new channels: two before, three after.
      expected[:, row, column, 2:5] = x[:, 2 * row, 2 * column]
  np.testing.assert_allclose(y, expected, rtol=1e-6)


def make(
  block_cls, *, shortcut, strides=1, filters=CHANNELS, first=False, inner=3
):
  """A block at inference."""
  return block_cls(
    inner_filters=inner,
    num_filters=filters,
    strides=strides,
    first_in_network=first,
    conv=functools.partial(
      layers.conv, padding="same", use_bias=True, dtype=jnp.float32
    ),
    norm=functools.partial(
      batch_norm.BatchNorm, use_running_average=True, epsilon=EPSILON
    ),
    act=nn.relu,
    shortcut=shortcut,
  )


def images():
  x = np.random.default_rng(0).normal(size=(2, 6, 6, CHANNELS))
  return jnp.asarray(x, jnp.float32)


def randomized(block):
  """Variables of which none has its initial value."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.uniform(0.3, 1.3, x.shape), jnp.float32),
    block.init(jax.random.key(0), images()),
  )


class Reference:
  """The operations of a block, by the names of its layers."""

  def __init__(self, variables, strides):
    self.params = variables["params"]
    self.stats = variables.get("batch_stats", {})
    self.strides = strides

  def conv(self, name, x, strides=1):
    layer = self.params[name]
    y = lax.conv_general_dilated(
      x,
      layer["kernel"],
      (strides, strides),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + layer["bias"][None, None, None]

  def bn(self, name, x):
    scale, bias, mean, var = (
      a[None, None, None]
      for a in (
        self.params[name]["scale"],
        self.params[name]["bias"],
        self.stats[name]["mean"],
        self.stats[name]["var"],
      )
    )
    return (x - mean) / jnp.sqrt(var + EPSILON) * scale + bias

  def shortcut(self, kind, x, filters):
    if kind == "A":
      return blocks.subsample_and_pad(x, self.strides, filters)
    if kind == "none":
      return 0
    y = self.conv("shortcut_conv", x, self.strides)
    return y if kind == "keras" else self.bn("shortcut_bn", y)

  def basic(self, x, residual):
    y = nn.relu(self.bn("bn1", self.conv("conv1", x, self.strides)))
    return nn.relu(self.bn("bn2", self.conv("conv2", y)) + residual)

  def bottleneck(self, x, residual, stride_in_3x3):
    first, second = (1, self.strides) if stride_in_3x3 else (self.strides, 1)
    y = nn.relu(self.bn("bn1", self.conv("conv1", x, first)))
    y = nn.relu(self.bn("bn2", self.conv("conv2", y, second)))
    return nn.relu(self.bn("bn3", self.conv("conv3", y)) + residual)

  def grouped(self, x, residual, groups):
    """Xie et al. 2017, figure 3b: each path by itself, then concatenated."""
    y = nn.relu(self.bn("bn1", self.conv("conv1", x)))
    layer = self.params["conv2"]
    width = y.shape[-1] // groups
    paths = []
    for k in range(groups):
      part = slice(k * width, (k + 1) * width)
      self.params["path"] = {
        "kernel": layer["kernel"][..., part],
        "bias": layer["bias"][part],
      }
      paths.append(self.conv("path", y[..., part], self.strides))
    y = nn.relu(self.bn("bn2", jnp.concatenate(paths, -1)))
    return nn.relu(self.bn("bn3", self.conv("conv3", y)) + residual)

  def highway(self, x, residual):
    y = nn.relu(self.bn("bn1", self.conv("conv1", x, self.strides)))
    y = self.bn("bn2", self.conv("conv2", y))
    gate = 1 / (1 + jnp.exp(-self.conv("gate_conv", x, self.strides)))
    return nn.relu((1 - gate) * residual + gate * y)

  def preact(self, x, residual, first=False):
    y = x if first else nn.relu(self.bn("bn1", x))
    y = self.conv("conv1", y, self.strides)
    y = self.conv("conv2", nn.relu(self.bn("bn2", y)))
    return residual + y

  def preact_bottleneck(self, x, residual, first=False):
    y = x if first else nn.relu(self.bn("bn1", x))
    y = nn.relu(self.bn("bn2", self.conv("conv1", y, self.strides)))
    y = nn.relu(self.bn("bn3", self.conv("conv2", y)))
    return residual + self.conv("conv3", y)


def assert_same(block, reference, shortcut, **details):
  variables = randomized(block)
  expected = Reference(variables, block.strides)
  x = images()
  residual = expected.shortcut(shortcut, x, block.num_filters)
  np.testing.assert_allclose(
    block.apply(variables, x),
    getattr(expected, reference)(x, residual, **details),
    rtol=1e-4,
    atol=1e-4,
  )


@pytest.mark.parametrize("shortcut", ["keras", "A", "B", "C", "none"])
def test_basic_where_the_shape_changes(shortcut):
  block = make(blocks.BasicBlock, shortcut=shortcut, strides=2, filters=6)
  assert_same(block, "basic", shortcut)


@pytest.mark.parametrize(
  ("shortcut", "then"),
  [("keras", "A"), ("A", "A"), ("B", "A"), ("C", "C"), ("none", "none")],
)
def test_basic_where_it_does_not(shortcut, then):
  """Where the shape stays, option A is the identity, and only C projects."""
  assert_same(make(blocks.BasicBlock, shortcut=shortcut), "basic", then)


@pytest.mark.parametrize("stride_in_3x3", [False, True])
def test_bottleneck(stride_in_3x3):
  block_cls = functools.partial(
    other_blocks.BottleneckBlock, stride_in_3x3=stride_in_3x3
  )
  block = make(block_cls, shortcut="B", strides=2, filters=6)
  assert_same(block, "bottleneck", "B", stride_in_3x3=stride_in_3x3)


def test_bottleneck_of_groups():
  block_cls = functools.partial(
    other_blocks.BottleneckBlock, stride_in_3x3=True, groups=3
  )
  block = make(block_cls, shortcut="B", strides=2, filters=6, inner=6)
  assert_same(block, "grouped", "B", groups=3)


@pytest.mark.parametrize("strides", [1, 2])
def test_highway(strides):
  block = make(other_blocks.HighwayBlock, shortcut="A", strides=strides)
  assert_same(block, "highway", "A")


def test_shut_gates_carry():
  """At a low bias the block is its shortcut, through the last ReLU."""
  block_cls = functools.partial(other_blocks.HighwayBlock, gate_bias=-30.0)
  block = make(block_cls, shortcut="A")
  variables = block.init(jax.random.key(0), images())
  np.testing.assert_allclose(
    block.apply(variables, images()), nn.relu(images()), atol=1e-6
  )
  bias = variables["params"]["gate_conv"]["bias"]
  np.testing.assert_array_equal(bias, np.full(CHANNELS, -30, np.float32))


@pytest.mark.parametrize(
  ("block_cls", "reference"),
  [
    (other_blocks.PreActBlock, "preact"),
    (other_blocks.PreActBottleneckBlock, "preact_bottleneck"),
  ],
)
@pytest.mark.parametrize("first", [False, True])
def test_preact(block_cls, reference, first):
  block = make(block_cls, shortcut="keras", strides=2, filters=6, first=first)
  assert_same(block, reference, "keras", first=first)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("filters", [CHANNELS, 6])
def test_wide(first, filters):
  """The shortcut takes the activated input where the shape changes."""
  block = make(
    functools.partial(other_blocks.PreActBlock, wide=True),
    shortcut="keras",
    filters=filters,
    first=first,
  )
  variables = randomized(block)
  x = images()
  of = Reference(variables, 1)
  active = x if first else nn.relu(of.bn("bn1", x))
  y = nn.relu(of.bn("bn2", of.conv("conv1", active)))
  is_same = filters == CHANNELS
  residual = x if is_same else of.conv("shortcut_conv", active)
  np.testing.assert_allclose(
    block.apply(variables, x),
    residual + of.conv("conv2", y),
    rtol=1e-4,
    atol=1e-4,
  )


def test_dropout_within_wide_blocks():
  """Kept inputs of the second convolution are scaled by 1 / (1 - rate)."""
  block = make(
    functools.partial(other_blocks.PreActBlock, wide=True, dropout=0.25),
    shortcut="keras",
    inner=500,
  )
  x = jnp.ones((1, 6, 6, CHANNELS))
  variables = block.init(jax.random.key(0), x)
  identity = jnp.zeros((3, 3, 500, CHANNELS)).at[1, 1, :, 0].set(1 / 500)
  variables["params"]["conv2"]["kernel"] = identity
  at_inference = block.apply(variables, x)
  trained = block.clone(train=True)
  means = jnp.stack(
    [
      trained.apply(variables, x, blocks.Context(jax.random.key(k)))
      for k in range(2)
    ]
  )[:, 0, 2:4, 2:4, 0]
  assert (np.asarray(means[0]) != np.asarray(means[1])).all()
  np.testing.assert_allclose(
    np.mean(means), np.mean(at_inference[0, 2:4, 2:4, 0]), rtol=0.1
  )


class Halve(nn.Module):
  train: bool

  def __call__(self, y, context):
    return y / 2


@pytest.mark.parametrize("shortcut", ["keras", "none"])
def test_a_branch_is_changed_before_the_sum(shortcut):
  block_cls = functools.partial(blocks.BasicBlock, branch=Halve)
  block = make(block_cls, shortcut=shortcut, strides=2, filters=6)
  variables, x = randomized(block), images()
  of = Reference(variables, 2)
  y = nn.relu(of.bn("bn1", of.conv("conv1", x, 2)))
  y = of.bn("bn2", of.conv("conv2", y))
  np.testing.assert_allclose(
    block.apply(variables, x),
    nn.relu(of.shortcut(shortcut, x, 6) + y / 2),
    rtol=1e-4,
    atol=1e-4,
  )
