import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from resnet_flax import errors, models, summary

SHAPE = (32, 32, 3)

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


def make(name="resnet_v1", depth=8, **overrides):
  config = base.get_config().model
  config.update({"name": name, "depth": depth, **overrides})
  return models.create_model(config, num_classes=10)


def init_shapes(model, shape=SHAPE):
  images = jnp.zeros((1, *shape))
  return jax.eval_shape(
    lambda: model.init(jax.random.key(0), images, train=False)
  )


@pytest.mark.parametrize(("name", "depth"), PARAMETERS)
def test_parameter_counts(name, depth):
  counts = summary.count_parameters(make(name, depth), SHAPE)
  assert counts == PARAMETERS[name, depth]


def test_every_model_has_a_pinned_count():
  assert {name for name, _ in PARAMETERS} == set(models.MODELS)


@pytest.mark.parametrize(
  ("name", "depth", "nearest"),
  [
    ("resnet_v1", 21, "20 and 26"),
    ("resnet_v1", 2, "8"),
    ("resnet_v1", 1, "8"),
    ("resnet_v1", 7, "8"),
    ("resnet_v2", 12, "11 and 20"),
    ("resnet_v2", -5, "11"),
  ],
)
def test_bad_depth_names_the_nearest(name, depth, nearest):
  with pytest.raises(errors.ConfigError, match=rf"nearest: {nearest}\."):
    make(name, depth)


def test_unknown_model_is_an_error():
  with pytest.raises(errors.ConfigError, match="Did you mean 'resnet_v"):
    make("resnet_v3")


def test_shortcut_that_the_family_lacks_is_an_error():
  with pytest.raises(errors.ConfigError, match="it has: keras"):
    make("resnet_v2", 11, shortcut="A")


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
  variables = same.init(jax.random.key(0), images, train=False)
  a = same.apply(variables, images, train=False)
  b = symmetric.apply(variables, images, train=False)
  assert a.shape == b.shape
  assert np.abs(a - b).max() > 1e-3
