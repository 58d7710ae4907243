"""Networks that other libraries have come back bit-identical."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from experiments.weights import __main__ as way_in, way_out
from resnet_flax.data import normalize
from resnet_flax.models import registry
from resnet_flax.run import errors, load
from resnet_flax.tools.export import weights
from resnet_flax.tools.weights import files, keras_names, mapping, pytorch_names

B = {"model.shortcut": "B"}
KINDS = {
  **{
    name: ("torchvision", way_in.TORCH[name])
    for name in (
      *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
      *("vgg19", "vgg19_bn", "alexnet"),
    )
  },
  **{
    name: ("cifar", way_in.TORCH[name])
    for name in ("cifar20", "cifar56", "cifar110")
  },
  "cifar20_b": ("cifar", way_in.TORCH["cifar20"] | B),
  "resnext50": (
    "torchvision",
    way_in.TORCH["resnet50"] | {"model.groups": 2, "model.group_width": 3},
  ),
  "wide_resnet50": (
    "torchvision",
    way_in.TORCH["resnet50"] | {"model.group_width": 8},
  ),
  **{name: ("keras", overrides) for name, overrides in way_in.KERAS.items()},
}
FILES = {
  "torchvision": ("safetensors",),
  "cifar": ("safetensors",),
  "keras": ("safetensors", "keras"),
}


def random_network(overrides, **more):
  """An untrained network, narrow, with 7 classes; every number is random."""
  config = way_out.make_config(overrides | more, side=64)
  if config.model.name not in ("vgg", "alexnet"):
    config.model.num_filters = 4
  model = registry.create_model(config.model, 7)
  if hasattr(model, "hidden_sizes"):
    model = model.clone(hidden_sizes=(5, 6))
  images = jnp.zeros((1, 64, 64, 3))
  init = functools.partial(model.lazy_init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), images)
  rng = np.random.default_rng(0)
  draw = functools.partial(rng.uniform, 0.1, 1)
  variables = jax.tree.map(lambda x: np.float32(draw(x.shape)), shapes)
  return load.LoadedModel(
    model=model,
    variables={"batch_stats": {}, **variables},
    predict=lambda images: None,
    preprocess=normalize.placeholder("none", (32, 32, 3)),
    class_names=(),
    image_shape=(32, 32, 3),
    config=config,
    step=0,
    seed=0,
  )


# One of each library: the others have the same names in other numbers.
FAST = ("cifar20", "example_v2_29", "resnet50", "vgg19_bn", "application_50")


@pytest.mark.parametrize(
  "kind",
  [
    pytest.param(kind, marks=[pytest.mark.slow] * (kind not in FAST))
    for kind in KINDS
  ],
)
def test_what_is_written_is_read_bit_for_bit(kind, tmp_path):
  names, overrides = KINDS[kind]
  loaded = random_network(overrides)
  network = weights.named(loaded, names)
  for form in FILES[names]:
    weights.write(form, network, loaded, tmp_path)
    file = files.read(tmp_path / way_out.FILES[form])
    library = keras_names if file.library == "keras" else pytorch_names
    source = library.identify(file)
    assert source.title == network.title
    assert source.num_classes == 7
    again = mapping.variables(file, source, loaded.variables)
    jax.tree.map(np.testing.assert_array_equal, again, loaded.variables)


def test_orbax_and_flax_names(tmp_path):
  ocp = pytest.importorskip("orbax.checkpoint")
  loaded = random_network({"model.name": "highway", "model.depth": 8})
  network = weights.named(loaded, "flax")
  assert "batch_stats/stage1_block1/bn1/mean" in network.arrays
  weights.write("orbax", network, loaded, tmp_path)
  with ocp.StandardCheckpointer() as checkpointer:
    again = checkpointer.restore(tmp_path / "checkpoint")
  jax.tree.map(np.testing.assert_array_equal, again, loaded.variables)


@pytest.mark.parametrize(
  ("overrides", "names", "message"),
  [
    ({"model.name": "highway"}, "cifar", "cifar has no highway"),
    ({"model.name": "preact"}, "keras", "keras has no preact"),
    ({"model.name": "plain"}, "cifar", "cifar has no plain"),
    ({"model.name": "resnet_v2"}, "torchvision", "torchvision has no resnet"),
    ({}, "cifar", "would need --config.model.shortcut=B .now default., "),
    (way_in.TORCH["cifar20"], "keras", r"has 19 convolutions\. A ResNet v1"),
    (
      {"model.shortcut": "B"},
      "keras",
      "would need --config.model.shortcut=keras .now B.",
    ),
    (
      way_in.TORCH["resnet50"],
      "keras",
      "would need .*--config.model.stride_in_3x3=false .now true.",
    ),
    *(
      (base | {f"model.{key}": value}, names, f"{key}|'branch'")
      for names, base in (
        ("torchvision", way_in.TORCH["resnet50"]),
        ("keras", way_in.KERAS["application_50"]),
      )
      for key, value in {
        "squeeze_excitation": 2,
        "stochastic_depth": 0.5,
        "weight_standardization": True,
        "norm": "group_norm",
      }.items()
    ),
    (way_in.KERAS["application_50"] | {"model.groups": 2}, "keras", "groups"),
    (
      {"model.name": "resnext", "model.depth": 11},
      "torchvision",
      "has no resnext",
    ),
    (way_in.TORCH["resnet18"], "keras", "ResNet152 of keras.applications"),
    (
      way_in.KERAS["example_v1_20"] | {"model.batch_norm_epsilon": 1e-5},
      "keras",
      "would need --config.model.batch_norm_epsilon=0.001 .now 1e-05.",
    ),
    (
      way_in.KERAS["example_v1_20"] | {"model.input_size": 64},
      "keras",
      "pools 8x8 pixels, as 32x32 images give; these images are 64x64",
    ),
  ],
)
def test_networks_that_a_library_lacks(overrides, names, message):
  """Also those with the same arrays, which would compute something else."""
  loaded = random_network(overrides)
  with pytest.raises(errors.WeightsError, match=message):
    weights.named(loaded, names)


@pytest.mark.parametrize(
  "path",
  [
    ("stage1_block1", "branch", "scale"),
    ("stage1_block1", "bn1", "LayerNorm_0", "scale"),
  ],
)
def test_layers_of_ones_own_are_refused(path):
  names, overrides = KINDS["cifar20"]
  loaded = random_network(overrides)
  arrays = traverse_util.flatten_dict(loaded.variables)
  arrays["params", *path] = np.float32(1)
  variables = traverse_util.unflatten_dict(arrays)
  with pytest.raises(errors.WeightsError, match="lacks layers of"):
    weights.named(dataclasses.replace(loaded, variables=variables), names)


@pytest.mark.parametrize("normalization", ["channel", "pixel_mean", "none"])
def test_any_normalization_goes_out(normalization):
  overrides = way_in.TORCH["resnet18"] | {"normalization": normalization}
  network = weights.named(random_network(overrides), "torchvision")
  assert network.title == "torchvision's ResNet-18"


# ---- In the libraries themselves


def logits(loaded, images):
  apply = functools.partial(loaded.model.apply, train=False)
  return np.asarray(jax.jit(apply)(loaded.variables, images))


def full_network(overrides, classes):
  """A network of the library's size, for small images."""
  config = way_out.make_config(overrides, side=64)
  if config.model.input_size:
    config.model.num_classes = classes
  return way_out.random_network(config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", way_in.TORCH)
def test_logits_in_torch(kind, tmp_path):
  torch = pytest.importorskip("torch", reason="needs torch and torchvision")
  pytest.importorskip("torchvision")
  from experiments.weights import torch_reference

  loaded = full_network(way_in.TORCH[kind], 1000)
  names = "cifar" if kind.startswith("cifar") else "torchvision"
  network = weights.named(loaded, names)
  weights.write("torch", network, loaded, tmp_path)
  model, side = torch_reference.build(kind)
  model.load_state_dict(torch.load(tmp_path / "weights.pt"), strict=True)
  side = min(side, 64)
  rng = np.random.default_rng(0)
  images = rng.normal(0, 1, (2, side, side, 3)).astype(np.float32)
  with torch.no_grad():
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2)
    theirs = model.eval()(inputs).numpy()
  assert way_in.relative_error(logits(loaded, images), theirs) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "form"),
  [
    ("example_v1_20", "keras"),
    ("example_v1_20", "safetensors"),
    ("example_v2_29", "keras"),
    ("application_50", "keras"),
  ],
)
def test_logits_in_keras(kind, form, tmp_path):
  pytest.importorskip("keras", reason="needs the extra [parity]")
  from experiments.weights import keras_reference

  _, overrides = KINDS[kind]
  loaded = full_network(overrides, 1000)
  network = weights.named(loaded, "keras")
  weights.write(form, network, loaded, tmp_path)
  side = 64 if kind == "application_50" else 32
  rng = np.random.default_rng(0)
  images = rng.normal(0, 1, (2, side, side, 3)).astype(np.float32)
  with jax.numpy_rank_promotion("allow"):
    keras_reference.keras.backend.clear_session()
    model, _ = keras_reference.build(kind, side, is_first=True)
    keras_reference.load(model, tmp_path / way_out.FILES[form])
    sees_bgr = kind == "application_50"
    inputs = images[..., ::-1] if sees_bgr else images
    theirs = keras_reference.logits_of(model, inputs)
  assert way_in.relative_error(logits(loaded, images), theirs) <= 1e-5
