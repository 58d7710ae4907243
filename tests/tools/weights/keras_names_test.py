"""Which of Keras's arrays are ours, with files of the real Keras."""

import json
import pathlib
import shutil
import warnings

import jax
import numpy as np
import pytest

from configs import base
from resnet_flax.run import errors, experiment as experiment_lib
from resnet_flax.tools.weights import files, keras_names, mapping

keras = pytest.importorskip("keras", reason="needs the extra [parity]")
h5py = pytest.importorskip("h5py")

from experiments.weights import keras_reference  # noqa: E402

EXTENSIONS = (".keras", ".weights.h5", ".h5")
MODELS = {
  "resnet_v1": (8, keras_reference.example_v1),
  "resnet_v2": (11, keras_reference.example_v2),
}


@pytest.fixture(autouse=True)
def _keras_promotes_ranks():
  with jax.numpy_rank_promotion("allow"):
    yield


def logits_of(model, x):
  """The head without its softmax, as one program."""
  head = model.layers[-1]
  features = keras.Model(model.inputs, head.input)
  outputs, _ = features.stateless_call(
    [v.value for v in features.trainable_variables],
    [v.value for v in features.non_trainable_variables],
    x,
    training=False,
  )
  kernel, bias = head.get_weights()
  return outputs @ kernel + bias


@pytest.fixture(scope="module", params=list(MODELS))
def saved(request, tmp_path_factory):
  """(name, folder): a tiny model in all formats, with images and logits."""
  folder = tmp_path_factory.mktemp(request.param)
  depth, build = MODELS[request.param]
  rng = np.random.default_rng(0)
  with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
    # Keras has not caught up with NumPy.
    warnings.simplefilter("ignore", DeprecationWarning)
    # Numbers of automatic names pass from one digit to two on the way.
    keras.backend.clear_session()
    for _ in range(3):
      keras.layers.Conv2D(1, 1)
      keras.layers.BatchNormalization()
    model = build(depth, width=4)
    for layer in model.layers:
      layer.set_weights(
        [w + rng.uniform(0, 0.5, w.shape) for w in layer.get_weights()]
      )
    model.compile("adam", "categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    images = rng.normal(0, 1, (2, 32, 32, 3)).astype(np.float32)
    np.savez(
      folder / "reference.npz",
      images=images,
      logits=jax.jit(lambda x: logits_of(model, x))(images),
    )
    for extension in EXTENSIONS:
      save = model.save_weights if "weights" in extension else model.save
      save(folder / f"a{extension}")
  return request.param, folder


def our_config(source):
  config = base.get_config()
  config.dataset.name = "digits"
  for key, values in source.needed.items():
    config.update_from_flattened_dict({key: values[0]})
  return config


def check_logits(path, reference):
  """The network with the file's weights gives Keras's logits."""
  file = files.read(path)
  source = keras_names.identify(file)
  config = our_config(source)
  assert not mapping.differing(source, config)
  parts = experiment_lib.build(config)
  like = experiment_lib.abstract_state(config, parts)
  variables = mapping.variables(
    file, source, {"params": like.params, "batch_stats": like.batch_stats}
  )
  ours = jax.jit(lambda x: parts.model.apply(variables, x, train=False))(
    reference["images"]
  )
  theirs = reference["logits"]
  assert np.abs(ours - theirs).max() / np.abs(theirs).max() <= 1e-5


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_logits(saved, extension):
  _, folder = saved
  path = folder / f"a{extension}"
  check_logits(path, np.load(folder / "reference.npz"))
  # The moments of Adam, its step and its rate.
  file = files.read(path)
  trained = [name for name in file.arrays if "/moving_" not in name]
  assert len(file.passed_over) == 2 * len(trained) + 2
  assert "dense/kernel" in file.arrays  # The only dense layer.
  assert "conv2d/kernel" not in file.arrays


def test_logits_without_layer_names(saved, tmp_path):
  """As before Keras 3.8."""
  _, folder = saved
  path = tmp_path / "a.weights.h5"
  shutil.copy(folder / "a.weights.h5", path)
  with h5py.File(path, "r+") as file:
    for group in file["layers"].values():
      del group["vars"].attrs["name"]
  assert not files.read(path).has_layer_names
  check_logits(path, np.load(folder / "reference.npz"))


def layer_of(kind, name, settings):
  return {"class_name": kind, "config": {**settings, "name": name}}


def identify(layers, arrays=None, has_layer_names=True):
  """The network of a file with these layers and kernels."""
  return keras_names.identify(
    files.WeightsFile(
      pathlib.Path("a.keras"),
      "keras",
      arrays or {},
      (),
      has_layer_names,
      tuple(layers),
    )
  )


def read_layers(saved, change):
  """The file whose layers have been changed one by one."""
  read = files.read(saved[1] / "a.keras")
  layers = []
  for layer in read.layers:
    settings = json.loads(json.dumps(layer["config"]))
    layers.append(change(layer["class_name"], settings["name"], settings))
  return identify(layers, read.arrays)


@pytest.mark.parametrize(
  ("kind", "key", "value", "message"),
  [
    ("Conv2D", "padding", "valid", "has the padding valid, which must be same"),
    (
      "Conv2D",
      "strides",
      [3, 3],
      r"has the strides \[3, 3\], which must be \[1, 1\]",
    ),
    (
      "Conv2D",
      "dilation_rate",
      [2, 2],
      r"has the dilation_rate \[2, 2\], which",
    ),
    ("Conv2D", "activation", "relu", "relu, which must be linear"),
    ("Dense", "activation", "relu", "relu, which must be linear or softmax"),
    ("Activation", "activation", "gelu", "gelu, which must be relu"),
    ("Activation", "activation", "softmax", "softmax, which must be relu"),
    ("Activation", "activation", "linear", "linear, which must be relu"),
  ],
)
def test_layers_that_compute_something_else(saved, kind, key, value, message):
  def change(found, name, settings):
    if found == kind:
      settings[key] = value
    return layer_of(found, name, settings)

  with pytest.raises(errors.WeightsError, match=message):
    read_layers(saved, change)


def with_layers(saved, *more):
  """The file with further layers; its head has no softmax."""
  read = files.read(saved[1] / "a.keras")
  *layers, head = read.layers
  settings = {**head["config"], "activation": "linear"}
  head = layer_of(head["class_name"], settings["name"], settings)
  return identify([*layers, head, *more], read.arrays)


def test_a_softmax_may_follow_the_head(saved):
  layer = layer_of("Activation", "last", {"activation": "softmax"})
  assert with_layers(saved, layer).num_classes == 10
  layer = layer_of("Activation", "last", {"activation": "relu"})
  with pytest.raises(errors.WeightsError, match="linear or softmax"):
    with_layers(saved, layer)


def test_relus_that_are_none(saved):
  usual = {"max_value": None, "negative_slope": 0.0, "threshold": 0.0}
  last = layer_of("Activation", "last", {"activation": "softmax"})
  assert with_layers(saved, layer_of("ReLU", "a", usual), last)
  for key in usual:
    layer = layer_of("ReLU", "a", {**usual, key: 0.5})
    with pytest.raises(errors.WeightsError, match=f"a has the {key} 0.5,"):
      with_layers(saved, layer, last)


def test_unknown_layers(saved):
  def change(kind, name, settings):
    kind = "Rescaling" if kind == "Flatten" else kind
    return layer_of(kind, name, settings)

  with pytest.raises(errors.WeightsError, match="is a Rescaling, which our"):
    read_layers(saved, change)


def test_epsilon_is_the_files(saved):
  def change(kind, name, settings):
    if kind == "BatchNormalization":
      settings["epsilon"] = 0.125
    return layer_of(kind, name, settings)

  source = read_layers(saved, change)
  assert source.needed["model.batch_norm_epsilon"] == (0.125,)

  def one(kind, name, settings):
    if name.endswith("_5"):
      settings["epsilon"] = 0.125
    return layer_of(kind, name, settings)

  with pytest.raises(
    errors.WeightsError, match=r"_5 has the epsilon 0.125, which must be"
  ):
    read_layers(saved, one)


SIZES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def application_arrays(sizes, head="predictions"):
  """Zeros with the names of keras.applications, and the stem's shape."""
  convs, norms = ["conv1_conv"], ["conv1_bn"]
  for stage, blocks in enumerate(sizes):
    for block in range(blocks):
      for k in [0, 1, 2, 3] if block == 0 else [1, 2, 3]:
        prefix = f"conv{stage + 2}_block{block + 1}_{k}"
        convs.append(f"{prefix}_conv")
        norms.append(f"{prefix}_bn")
  arrays = {f"{name}/kernel": np.zeros((1, 1, 1, 1)) for name in convs}
  arrays["conv1_conv/kernel"] = np.zeros((7, 7, 3, 64))
  arrays |= {f"{name}/bias": np.zeros(64) for name in convs}
  for part in ("gamma", "beta", "moving_mean", "moving_variance"):
    arrays |= {f"{name}/{part}": np.zeros(1) for name in norms}
  arrays[f"{head}/kernel"] = np.zeros((2, 7))
  arrays[f"{head}/bias"] = np.zeros(7)
  return arrays


@pytest.mark.parametrize("head", ["predictions", "probs"])
def test_applications(head):
  arrays = application_arrays(SIZES[50], head)
  source = identify([], arrays)
  assert source.title == "keras.applications' ResNet50"
  assert source.num_classes == 7
  assert source.needed["model.batch_norm_epsilon"] == (1.001e-5,)
  config = our_config(source)
  config.model.input_size = 64
  like = experiment_lib.abstract_state(config, experiment_lib.build(config))
  tree = {"params": like.params, "batch_stats": like.batch_stats}
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  paths = [tuple(key.key for key in path) for path, _ in flat]
  origins = [source.origin(path) for path in paths]
  assert sorted(origin.name for origin in origins) == sorted(arrays)
  # Their network sees blue first.
  view = source.origin(("params", "stem_conv", "kernel")).view
  kernel = np.arange(6).reshape(1, 1, 3, 2)
  np.testing.assert_array_equal(view(kernel)[0, 0], kernel[0, 0, ::-1])


@pytest.mark.parametrize("depth", [101, 152])
def test_deeper_applications(depth):
  source = identify([], application_arrays(SIZES[depth]))
  assert source.needed["model.depth"] == (depth,)


def test_application_of_another_depth():
  with pytest.raises(errors.WeightsError, match="has 56 convolutions"):
    identify([], application_arrays((3, 4, 7, 3)))


def test_application_v2_with_its_names():
  arrays = application_arrays(SIZES[50])
  arrays["post_bn/gamma"] = np.zeros(1)
  with pytest.raises(errors.WeightsError, match=r"ResNet V2 .* fits no"):
    identify([], arrays)


def test_arrays_of_application_v2_are_left_over():
  source = identify([], application_arrays(SIZES[50]))
  config = our_config(source)
  config.model.input_size = 64
  like = experiment_lib.abstract_state(config, experiment_lib.build(config))
  tree = {"params": like.params, "batch_stats": like.batch_stats}
  arrays = {"post_bn/gamma": np.zeros(1)}
  for path, leaf in jax.tree.leaves_with_path(tree):
    origin = source.origin(tuple(key.key for key in path))
    arrays[origin.name] = np.zeros(leaf.shape, np.float32)
  file = files.WeightsFile(pathlib.Path("a.keras"), "keras", arrays, ())
  with pytest.raises(
    errors.WeightsError, match=r"over: post_bn/gamma\[1\]\. Missing: none"
  ):
    mapping.variables(file, source, tree)


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({}, "has: none"),
    ({"lstm/kernel": np.zeros((2, 2))}, "has: lstm/kernel"),
    (
      {
        "conv2d/kernel": np.zeros((3, 3, 3, 4)),
        "conv2d_1/kernel": np.zeros((3, 3, 4, 4)),
        "dense/kernel": np.zeros((4, 10)),
      },
      r"has 2 convolutions\. A ResNet v1",
    ),
  ],
)
def test_other_networks(arrays, message):
  with pytest.raises(errors.WeightsError, match=message):
    identify([], arrays)
