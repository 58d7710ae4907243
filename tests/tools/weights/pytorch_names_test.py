"""Which of PyTorch's arrays are ours."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from resnet_flax.models import registry
from resnet_flax.run import errors
from resnet_flax.tools.weights import files, mapping, pytorch_names
from tests.tools.weights import networks


def weights_file(arrays):
  return files.WeightsFile(pathlib.Path("a.pt"), "pytorch", arrays, ())


def our_paths(source, **more):
  """The paths of our network, as the source needs it."""
  config = base.get_config()
  for key, values in source.needed.items():
    config.update_from_flattened_dict({key: values[0]})
  config.model.update(more)
  model = registry.create_model(config.model, 10)
  size = 32 if config.model.name == "resnet_v1" else 64
  variables = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False
    )
  )
  flat, _ = jax.tree_util.tree_flatten_with_path(variables)
  return [tuple(key.key for key in path) for path, _ in flat]


def norm_names(layer):
  parts = ("weight", "bias", "running_mean", "running_var")
  return {f"{layer}.{part}" for part in parts}


def resnet_names(sizes, convs):
  """The names of torchvision's ResNets, counters left out."""
  names = {"conv1.weight", "fc.weight", "fc.bias", *norm_names("bn1")}
  for stage, blocks in enumerate(sizes):
    for block, k in itertools.product(range(blocks), range(1, convs + 1)):
      prefix = f"layer{stage + 1}.{block}"
      names |= {f"{prefix}.conv{k}.weight", *norm_names(f"{prefix}.bn{k}")}
      # The first stage of a bottleneck network changes the channels.
      if block == 0 and (stage > 0 or convs == 3):
        names |= {
          f"{prefix}.downsample.0.weight",
          *norm_names(f"{prefix}.downsample.1"),
        }
  return names


def arrays_of(names, **shapes):
  arrays = dict.fromkeys(sorted(names), np.zeros((64,), np.float32))
  return arrays | {
    name: np.zeros(shape, np.float32) for name, shape in shapes.items()
  }


@pytest.mark.parametrize(
  ("depth", "sizes", "convs"),
  [
    (18, (2, 2, 2, 2), 2),
    (34, (3, 4, 6, 3), 2),
    (50, (3, 4, 6, 3), 3),
  ],
)
def test_torchvision_resnets(depth, sizes, convs):
  names = resnet_names(sizes, convs)
  width = {"layer1.0.conv2.weight": (64, 64, 3, 3)}
  arrays = arrays_of(names, **width)
  source = pytorch_names.identify(weights_file(arrays))
  assert source.title == f"torchvision's ResNet-{depth}"
  assert source.needed["model.depth"] == (depth,)
  assert ("model.stride_in_3x3" in source.needed) == (convs == 3)
  origins = [source.origin(path).name for path in our_paths(source)]
  assert sorted(origins) == sorted(names)


@pytest.mark.parametrize(
  ("groups", "width", "keys"),
  [
    # torchvision's resnext50_32x4d and wide_resnet50_2.
    (32, 4, {"model.groups": (32,), "model.group_width": (4,)}),
    (1, 128, {"model.groups": (0, 1), "model.group_width": (128,)}),
    (1, 64, {"model.groups": (0, 1), "model.group_width": (0, 64)}),
  ],
)
def test_torchvision_resnets_of_groups_and_wide_ones(groups, width, keys):
  """By torchvision's resnet.py: int(planes * width / 64) * groups inside."""
  names = resnet_names((3, 4, 6, 3), 3)
  kernels, channels_in = {}, 64
  for stage, blocks in enumerate((3, 4, 6, 3)):
    planes = 64 * 2**stage
    inner = int(planes * width / 64) * groups
    for block in range(blocks):
      prefix = f"layer{stage + 1}.{block}"
      kernels |= {
        f"{prefix}.conv1.weight": (inner, channels_in, 1, 1),
        f"{prefix}.conv2.weight": (inner, inner // groups, 3, 3),
        f"{prefix}.conv3.weight": (4 * planes, inner, 1, 1),
      }
      if block == 0:
        shape = (4 * planes, channels_in, 1, 1)
        kernels[f"{prefix}.downsample.0.weight"] = shape
      channels_in = 4 * planes
  source = pytorch_names.identify(weights_file(arrays_of(names, **kernels)))
  assert source.title == "torchvision's ResNet-50" + (
    f" {groups}x{width}d" * ((groups, width) != (1, 64))
  )
  assert keys.items() <= source.needed.items()
  config = base.get_config()
  for key, values in source.needed.items():
    config.update_from_flattened_dict({key: values[0]})
  model = registry.create_model(config.model, 10)
  shapes = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False
    )
  )
  found = {}
  for path, leaf in jax.tree.leaves_with_path(shapes):
    origin = source.origin(tuple(key.key for key in path))
    assert origin.name in names
    if origin.name in kernels:
      h, w, i, o = leaf.shape
      found[origin.name] = (o, i, h, w)
  assert found == kernels


def feedforward_names(convs, norms, dense):
  names = {f"features.{k}.{part}" for k in convs for part in ("weight", "bias")}
  names |= {f"classifier.{k}.{p}" for k in dense for p in ("weight", "bias")}
  for k in norms:
    names |= norm_names(f"features.{k}")
  return names


def with_kernels(arrays, convs):
  """The arrays, those of convolutions with four dimensions."""
  kernel = np.zeros((1, 1, 1, 1), np.float32)
  return arrays | {f"features.{k}.weight": kernel for k in convs}


# Convolution and ReLU, with batch norm in between; a pool after some.
VGG19 = [2, 2, 4, 4, 4]
VGG16 = [2, 2, 3, 3, 3]


def vgg_places(has_norm, stages=VGG19):
  place, places = 0, []
  for convs in stages:
    for _ in range(convs):
      places.append(place)
      place += 3 if has_norm else 2
    place += 1
  return places


@pytest.mark.parametrize(
  ("title", "convs", "norms", "dense"),
  [
    ("VGG-19", vgg_places(False), [], [0, 3, 6]),
    ("VGG-19 with BN", vgg_places(True), vgg_places(True), [0, 3, 6]),
    ("AlexNet", [0, 3, 6, 8, 10], [], [1, 4, 6]),
  ],
)
def test_torchvision_without_blocks(title, convs, norms, dense):
  names = feedforward_names(convs, [k + 1 for k in norms], dense)
  source = pytorch_names.identify(
    weights_file(with_kernels(arrays_of(names), convs))
  )
  assert source.title == f"torchvision's {title}"
  paths = our_paths(source)
  assert sorted(source.origin(path).name for path in paths) == sorted(names)


def test_dense_layer_after_a_flatten():
  """It sees rows, columns, channels, not channels, rows, columns."""
  rng = np.random.default_rng(0)
  features = rng.normal(size=(5, 3, 3))  # C, H, W
  kernel = rng.normal(size=(7, 45))
  ours = np.empty((45, 7))
  view = pytorch_names._view(3, ours)
  view[...] = kernel.reshape(view.shape)
  np.testing.assert_allclose(
    np.transpose(features, (1, 2, 0)).ravel() @ ours, kernel @ features.ravel()
  )


def test_values_of_a_cifar_resnet():
  state = networks.cifar_state_dict()
  arrays = {k: v for k, v in state.items() if not k.endswith("_tracked")}
  file = weights_file(arrays)
  source = pytorch_names.identify(file)
  assert source.title == "a PyTorch CIFAR ResNet-8 with option A shortcuts"
  assert source.num_classes == 10
  like = {"params": {}, "batch_stats": {}}
  for path in our_paths(source):
    node = like
    for key in path[:-1]:
      node = node.setdefault(key, {})
    theirs = arrays[source.origin(path).name]
    if theirs.ndim > 1:
      theirs = np.moveaxis(theirs, (0, 1), (-1, -2))
    node[path[-1]] = theirs
  ours = mapping.variables(file, source, like)
  block = ours["params"]["stage2_block1"]
  np.testing.assert_array_equal(
    block["conv1"]["kernel"][0, 2, 1, 3],
    state["layer2.0.conv1.weight"][3, 1, 0, 2],
  )
  np.testing.assert_array_equal(
    block["bn2"]["scale"], state["layer2.0.bn2.weight"]
  )
  np.testing.assert_array_equal(
    ours["batch_stats"]["stage3_block1"]["bn1"]["var"],
    state["layer3.0.bn1.running_var"],
  )
  np.testing.assert_array_equal(
    ours["params"]["head"]["kernel"].T, state["linear.weight"]
  )


def test_projections_are_option_b():
  state = networks.cifar_state_dict()
  state["layer2.0.shortcut.0.weight"] = np.zeros((8, 4, 1, 1), np.float32)
  source = pytorch_names.identify(weights_file(state))
  assert source.needed["model.shortcut"] == ("B",)
  path = ("params", "stage2_block1", "shortcut_bn", "scale")
  assert source.origin(path).name == "layer2.0.shortcut.1.weight"


@pytest.mark.parametrize(
  ("names", "message"),
  [
    ([], "has: none"),
    (["blocks.0.attn.qkv.weight"], "has: blocks.0.attn.qkv.weight"),
    (resnet_names((3, 4, 6, 2), 3), r"a ResNet with \(3, 4, 6, 2\) blocks"),
    # A wide ResNet for CIFAR with four stages is another network.
    (
      [f"layer{k}.0.conv1.weight" for k in range(1, 5)]
      + ["conv1.weight", "linear.weight"],
      "must hold a known network",
    ),
  ],
)
def test_other_networks(names, message):
  with pytest.raises(errors.WeightsError, match=message):
    pytorch_names.identify(weights_file(arrays_of(names)))


@pytest.mark.parametrize("has_norm", [False, True])
def test_vgg_of_another_depth(has_norm):
  convs = vgg_places(has_norm, VGG16)
  norms = [k + 1 for k in convs] if has_norm else []
  arrays = arrays_of(feedforward_names(convs, norms, [0, 3, 6]))
  file = weights_file(with_kernels(arrays, convs))
  with pytest.raises(errors.WeightsError, match="has 13 convolutions"):
    pytorch_names.identify(file)
