import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from resnet_flax.models import registry
from resnet_flax.run import errors, rules
from resnet_flax.tools import summary

SHAPE = (32, 32, 3)
LARGE = (224, 224, 3)

# (total, trainable), counted by Keras on the example's own models.
PARAMETERS = {
  ("resnet_v1", 8): (78_666, 78_186),
  ("resnet_v1", 20): (274_442, 273_066),
  ("resnet_v1", 32): (470_218, 467_946),
  ("resnet_v1", 44): (665_994, 662_826),
  ("resnet_v1", 56): (861_770, 857_706),
  ("resnet_v1", 110): (1_742_762, 1_734_666),
  ("resnet_v2", 11): (299_178, 297_418),
  ("resnet_v2", 20): (574_090, 570_602),
  ("resnet_v2", 29): (849_002, 843_786),
  ("resnet_v2", 56): (1_673_738, 1_663_338),
  ("resnet_v2", 110): (3_323_210, 3_302_442),
  ("resnet_v2", 164): (4_972_682, 4_941_546),
}


# Trainable, without biases of convolutions, and who says so: Zagoruyko and
# Komodakis 2016, table 4, in full as the authors' PyTorch port counts them; Xie
# et al. 2017, table 7; torchvision. docs/networks.md has more, which
# tests/experiments/tools/networks_test.py holds to what is published.
PUBLISHED = [
  ("wide_resnet", 28, {}, 36_479_194, "36.5 M"),
  ("wide_resnet", 16, {"widen_factor": 4}, 2_748_890, "2.7 M"),
  ("wide_resnet", 16, {"widen_factor": 8}, 10_961_370, "11.0 M"),
  ("wide_resnet", 22, {"widen_factor": 8}, 17_158_106, "17.2 M"),
  ("wide_resnet", 40, {"widen_factor": 1}, 563_930, "0.6 M"),
  ("wide_resnet", 40, {"widen_factor": 2}, 2_243_546, "2.2 M"),
  ("wide_resnet", 40, {"widen_factor": 4}, 8_949_210, "8.9 M"),
  ("resnext", 29, {}, 34_426_698, "34.4 M"),
  ("resnext", 29, {"groups": 16}, 68_155_210, "68.2 M"),
  (
    "resnet_imagenet",
    101,
    {"groups": 32, "group_width": 8},
    88_791_336,
    "torchvision's resnext101_32x8d",
  ),
  # Group norm has the parameters of batch norm.
  (
    "resnet_imagenet",
    50,
    {"norm": "group_norm", "weight_standardization": True},
    25_557_032,
    "torchvision's resnet50",
  ),
]


def make(name="resnet_v1", depth=8, num_classes=10, **overrides):
  config = base.get_config().model
  config.update({"name": name, "depth": depth, **overrides})
  return registry.create_model(config, num_classes)


def init_shapes(model, shape=SHAPE):
  images = jnp.zeros((1, *shape))
  return jax.eval_shape(
    lambda: model.init(jax.random.key(0), images, train=False)
  )


@pytest.mark.parametrize(("name", "depth"), PARAMETERS)
def test_parameter_counts(name, depth):
  size = summary.measure_size(make(name, depth), SHAPE)
  assert (size.total, size.trainable) == PARAMETERS[name, depth]


def test_plain_network_for_large_images():
  """ResNet-18's without its three projections with batch norm."""
  size = summary.measure_size(
    make("plain_imagenet", 18, 1000, conv_bias=False), LARGE
  )
  projections = (64 + 2) * 128 + (128 + 2) * 256 + (256 + 2) * 512
  assert size.trainable == 11_689_512 - projections


@pytest.mark.parametrize(
  ("name", "depth", "overrides", "expected", "says"),
  PUBLISHED,
  ids=[f"{name}-{depth}-{says}" for name, depth, _, _, says in PUBLISHED],
)
def test_published_parameter_counts(name, depth, overrides, expected, says):
  is_large = name == "resnet_imagenet"
  classes, shape = (1000, LARGE) if is_large else (10, SHAPE)
  model = make(name, depth, classes, conv_bias=False, **overrides)
  found = summary.measure_size(model, shape).trainable
  assert found == expected
  if says.endswith(" M"):
    assert f"{found / 1e6:.1f} M" == says


def test_vgg_with_batch_norm():
  """torchvision's vgg19_bn: scale and bias for each of its 5,504 channels."""
  size = summary.measure_size(make("vgg", 19, 1000), LARGE)
  assert size.trainable == 143_667_240 + 2 * 5_504


@pytest.mark.parametrize(
  ("name", "depth", "shortcut"),
  [
    ("resnet_v1", 8, "C"),
    ("resnet_v2", 11, "keras"),
    ("plain", 8, "none"),
    ("preact", 8, "A"),
    ("highway", 8, "B"),
    ("wide_resnet", 10, "keras"),
    ("resnext", 11, "B"),
  ],
)
def test_small_networks_without_batch_norm(name, depth, shortcut):
  """The other parameters are the same, with the same initial values."""
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  with_norm, without = (
    make(name, depth, shortcut=shortcut, num_filters=4, norm=norm).lazy_init(
      jax.random.key(0), images, train=False
    )
    for norm in ("batch_norm", "none")
  )
  assert set(without) == {"params"}
  kept = {
    path: leaf
    for path, leaf in jax.tree.leaves_with_path(with_norm["params"])
    if "bn" not in jax.tree_util.keystr(path)
  }
  found = dict(jax.tree.leaves_with_path(without["params"]))
  assert (
    found.keys()
    == kept.keys()
    < set(dict(jax.tree.leaves_with_path(with_norm["params"])))
  )
  for path, leaf in found.items():
    np.testing.assert_array_equal(leaf, kept[path])


# Parameters of v1 with the Keras example's shortcuts, at depth 20, and what the
# others have besides: projections from 16 to 32 and from 32 to 64 channels.
KERAS_20 = 273_066
PROJECTIONS = 16 * 32 + 32 + 32 * 64 + 64
NORMS = 2 * 32 + 2 * 64
# One of the three blocks of each stage; all but the projecting ones.
SAME_SHAPE = sum(
  blocks * (c * c + c) for blocks, c in [(3, 16), (2, 32), (2, 64)]
)
SAME_SHAPE_NORMS = sum(
  blocks * 2 * c for blocks, c in [(3, 16), (2, 32), (2, 64)]
)
VARIANTS = [
  ("plain", {}, KERAS_20 - PROJECTIONS),
  ("resnet_v1", {"shortcut": "keras"}, KERAS_20),
  ("resnet_v1", {"shortcut": "A"}, KERAS_20 - PROJECTIONS),
  ("resnet_v1", {"shortcut": "B"}, KERAS_20 + NORMS),
  (
    "resnet_v1",
    {"shortcut": "C"},
    KERAS_20 + NORMS + SAME_SHAPE + SAME_SHAPE_NORMS,
  ),
  # Normalised channels sum up to v1's: a block's first batch norm has the
  # channels of the block before, and the last block's are in `final_bn`.
  ("preact", {}, KERAS_20 - PROJECTIONS),
  ("preact", {"shortcut": "keras"}, KERAS_20),
  # A gate for each block, where shapes change as large as a projection.
  ("highway", {}, KERAS_20 - PROJECTIONS + PROJECTIONS + SAME_SHAPE),
]


@pytest.mark.parametrize(
  ("name", "overrides", "expected"),
  VARIANTS,
  ids=["-".join([v[0], *v[1].values()]) for v in VARIANTS],
)
def test_variants_of_depth_20(name, overrides, expected):
  size = summary.measure_size(make(name, 20, **overrides), SHAPE)
  assert size.trainable == expected


def test_deepest_of_the_papers_can_be_built():
  assert make("resnet_v1", 1202).stage_sizes == (200, 200, 200)
  assert make("resnet_v2", 1001).stage_sizes == (111, 111, 111)


@pytest.mark.parametrize(
  ("name", "depth", "nearest"),
  [
    ("resnet_v1", 21, "20 and 26"),
    ("resnet_v1", 2, "8"),
    ("resnet_v1", 1, "8"),
    ("resnet_v1", 7, "8"),
    ("resnet_v2", 12, "11 and 20"),
    ("resnet_v2", -5, "11"),
    ("highway", 21, "20 and 26"),
    ("wide_resnet", 20, "16 and 22"),
    ("wide_resnet", 4, "10"),
    ("resnext", 28, "20 and 29"),
    ("resnet_imagenet", 20, "18 and 34"),
    ("resnet_imagenet", 200, "152"),
    ("plain_imagenet", 50, "34"),
    ("vgg", 16, "19"),
    ("alexnet", 19, "8"),
  ],
)
def test_bad_depth_names_the_nearest(name, depth, nearest):
  with pytest.raises(errors.ConfigError, match=rf"nearest: {nearest}\."):
    make(name, depth)


def test_unknown_model_is_an_error():
  with pytest.raises(errors.ConfigError, match="Did you mean 'resnet_v"):
    make("resnet_v3")


@pytest.mark.parametrize(
  ("name", "depth", "size", "message"),
  [
    ("resnet_imagenet", 18, 32, r"32x32 .* too small .* model.input_size=224"),
    ("vgg", 19, 32, "too small"),
    ("alexnet", 8, 63, "takes 64x64 to 2048"),
    ("resnet_v1", 8, 224, "too large .*resnet_imagenet"),
    ("highway", 8, 224, "takes 1x1 to 128x128"),
  ],
)
def test_images_that_a_stem_is_not_made_for(name, depth, size, message):
  config = base.get_config().model
  config.update({"name": name, "depth": depth})
  with pytest.raises(errors.ConfigError, match=message):
    rules.check_input_size(config, (size, size, 3))
  # Of images that are decoded while training another key says the size.
  with pytest.raises(errors.ConfigError, match=r"Set dataset\.image_size="):
    rules.check_input_size(config, (size, size, 3), is_streamed=True)
  config.input_size = size
  with pytest.raises(errors.ConfigError, match=r"Set model\.input_size="):
    rules.check_input_size(config, (1, 1, 3), is_streamed=True)


def test_resized_images_are_taken():
  model = make("resnet_imagenet", 18, input_size=64)
  images = np.random.default_rng(0).normal(size=(1, *SHAPE))
  logits = jax.eval_shape(
    lambda v, x: model.apply(v, x, train=False), init_shapes(model), images
  )
  assert logits.shape == (1, 10)


@pytest.mark.parametrize(
  ("name", "depth"), [("resnet_v1", 8), ("resnet_v2", 11)]
)
def test_logits_shape_and_dtype(name, depth):
  model = make(name, depth, dtype="bfloat16")
  variables = init_shapes(model)
  logits = jax.eval_shape(
    lambda v, x: model.apply(v, x, train=False),
    variables,
    jax.ShapeDtypeStruct((5, *SHAPE), jnp.float32),
  )
  assert logits.shape == (5, 10)
  assert logits.dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_bfloat16_is_what_is_computed_in():
  model = make(dtype="bfloat16")
  # Of a platform on which every convolution is XLA's.
  export = jax.export.export(
    jax.jit(lambda v, x: model.apply(v, x, train=False)), platforms=["tpu"]
  )
  text = export(init_shapes(model), jnp.zeros((1, *SHAPE))).mlir_module()
  convolutions = [x for x in text.splitlines() if "stablehlo.convolution" in x]
  assert len(convolutions) == 9
  assert all("xbf16>" in line for line in convolutions)


def test_shortcut_a_has_no_parameters():
  keras, option_a = make(), make(shortcut="A")
  with_projection = init_shapes(keras)["params"]
  without = init_shapes(option_a)["params"]
  assert "shortcut_conv" in with_projection["stage2_block1"]
  assert "shortcut_conv" not in without["stage2_block1"]


def test_no_conv_bias():
  params = init_shapes(make(conv_bias=False))["params"]
  assert set(params["stem_conv"]) == {"kernel"}


def test_paddings_differ_at_stride_two():
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, *SHAPE)))
  same, symmetric = make(), make(padding="symmetric")
  variables = same.lazy_init(
    jax.random.key(0),
    jax.ShapeDtypeStruct(images.shape, images.dtype),
    train=False,
  )
  a, b = (
    jax.jit(functools.partial(model.apply, train=False))(variables, images)
    for model in (same, symmetric)
  )
  assert a.shape == b.shape
  assert np.abs(a - b).max() > 1e-3
