"""Keras's names: the CIFAR-10 example's networks and `keras.applications`.

Sources: the layers of the Keras example (ResNet v1 and v2 for CIFAR-10), which
have automatic names, and those of `keras.applications`' ResNet50, 101 and 152.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from resnet_flax.models import other_blocks as others
from resnet_flax.run import errors
from resnet_flax.tools.weights import files, mapping
from resnet_flax.tools.weights.mapping import Origin, OriginOf, Path, Source

# Maps each of our layers, such as ('stage1_block1', 'conv1'), to its name in a
# file.
Names = Mapping[Path, str]

_NORM = {
  "scale": "gamma",
  "bias": "beta",
  "mean": "moving_mean",
  "var": "moving_variance",
}
# Names of the head; older files have the second one.
_HEADS = ("predictions", "probs")
# Parts of our layers' names, and Keras's automatic names of such layers.
_KINDS = (("conv", "conv2d"), ("bn", "batch_normalization"))

# For each network of the example, the layers that it gains if each stage gains
# a block.
_PER_GROUP = {"resnet_v1": 6, "resnet_v2": 9}
# The layers of a block in the order in which they are created. Only the first
# block of a stage has those of the shortcut.
_BLOCKS = {
  "resnet_v1": "conv1 bn1 conv2 bn2 shortcut_conv",
  "resnet_v2": "bn1 conv1 bn2 conv2 bn3 conv3 shortcut_conv",
  "resnet_imagenet": (
    "conv1 bn1 conv2 bn2 shortcut_conv shortcut_bn conv3 bn3"
  ),
}
# The layer that the first block of the network lacks.
_FIRST_LACKS = {"resnet_v1": "shortcut_conv", "resnet_v2": "bn1"}


def identify(file: files.WeightsFile) -> Source:
  """Finds the network of a file with Keras's names."""
  kernels = [v for k, v in file.arrays.items() if k.endswith("/kernel")]
  if any(array.shape[:2] == (7, 7) for array in kernels):
    return _applications(file)
  if _numbered(file, "conv2d") and len(_numbered(file, "dense")) == 1:
    return _example(file)
  raise mapping.unknown(
    file,
    "with Keras's names these are the CIFAR-10 example's ResNet v1 and v2 and"
    " keras.applications' ResNet50, ResNet101 and ResNet152, with their heads",
  )


def _numbered(file: files.WeightsFile, kind: str) -> list[str]:
  """The layers with an automatic name, in the order of their numbers.

  Keras counts over all models of a process, so numbers may start anywhere.
  """
  found = [name for name in _layers(file) if files.layer_class(name) == kind]
  return sorted(found, key=lambda name: (len(name), name))


def _layers(file: files.WeightsFile) -> set[str]:
  return {name.partition("/")[0] for name in file.arrays}


# ---- The networks


def _example(file: files.WeightsFile) -> Source:
  convs = _numbered(file, "conv2d")
  (head,) = _numbered(file, "dense")
  # A bottleneck begins with a 1x1 convolution.
  is_v2 = file.shape(f"{convs[:2][-1]}/kernel")[:2] == (1, 1)
  version, projections = ("v2", 3) if is_v2 else ("v1", 2)
  name = f"resnet_{version}"
  # The stem and the projections do not belong to the groups of layers.
  blocks, rest = divmod(len(convs) - 1 - projections, _PER_GROUP[name])
  if rest or blocks < 1:
    raise errors.WeightsError(
      f"{file.path} has {len(convs)} convolutions. A ResNet {version} of the"
      f" Keras example must have {_PER_GROUP[name]}n+{1 + projections}, for n"
      " blocks in each stage."
    )
  depth = _PER_GROUP[name] * blocks + 2
  ours = _ours(name, depth, file.has_layer_names)
  theirs = _in_turn(ours, head, functools.partial(_found, file))
  _check_layers(file, theirs, padding="same", stem_strides=1)
  return Source(
    f"the Keras example's ResNet-{depth} {version}",
    file.shape(f"{head}/bias")[-1],
    functools.partial(_origin, theirs),
    # The example has a switch for these two.
    normalization=("pixel_mean", "none"),
    name=name,
    depth=depth,
    num_filters=mapping.width(file.shape(f"{convs[0]}/kernel")[-1], usual=16),
    shortcut=("keras", "default"),
    padding="same",
    conv_bias=True,
    batch_norm_epsilon=_epsilon(file, usual=1e-3),
  )


def _applications(file: files.WeightsFile) -> Source:
  layers = _layers(file)
  if file.has_layer_names:
    is_v2 = bool({"post_bn", "conv2_block1_preact_bn"} & layers)
  else:
    is_v2 = len(_numbered(file, "batch_normalization")) != file.num_convs
  if is_v2:
    raise errors.WeightsError(
      f"{file.path} holds a ResNet V2 of keras.applications, which does not"
      " fit: its strides are in the last block of a stage, and its shortcuts"
      " project activated values. It must be ResNet50, ResNet101 or ResNet152."
    )
  # The depth counts the head, but not the projection of each of four stages.
  depth = file.num_convs + 1 - 4
  if depth < others.FIRST_BOTTLENECK or depth not in others.IMAGENET_SIZES:
    raise errors.WeightsError(
      f"{file.path} has {file.num_convs} convolutions. It must be ResNet50,"
      " ResNet101 or ResNet152 of keras.applications."
    )
  ours = _ours("resnet_imagenet", depth)
  if file.has_layer_names:
    head = next((name for name in _HEADS if name in layers), _HEADS[0])
    theirs = _application_names(ours, head)
  else:
    head = next(iter(_numbered(file, "dense")), "dense")
    theirs = _in_turn(ours, head, functools.partial(_found, file))
  _check_layers(file, theirs, padding=None, stem_strides=2)
  stem = theirs[("stem_conv",)]
  return Source(
    f"keras.applications' ResNet{depth}",
    file.shape(f"{head}/bias")[-1],
    functools.partial(_origin, theirs, flip_stem=True),
    normalization=("caffe",),
    name="resnet_imagenet",
    depth=depth,
    num_filters=mapping.width(file.shape(f"{stem}/bias")[-1], usual=64),
    shortcut=("B", "default"),
    stride_in_3x3=False,
    padding="symmetric",
    conv_bias=True,
    batch_norm_epsilon=_epsilon(file, usual=1.001e-5),
  )


# ---- Our layers and theirs


def _ours(name: str, depth: int, as_created: bool = True) -> list[Path]:
  """Our layers but the head, in the order of creation or of `model.layers`."""
  if name == "resnet_imagenet":
    sizes: Sequence[int] = others.IMAGENET_SIZES[depth]
  else:
    sizes = [(depth - 2) // _PER_GROUP[name]] * 3
  order = _BLOCKS[name].split()
  if name == "resnet_v2" and not as_created:
    # The shortcut is created last, but precedes conv3 in `model.layers`.
    order[-2:] = ["shortcut_conv", "conv3"]
  paths: list[Path] = [("stem_conv",), ("stem_bn",)]
  for stage, blocks in enumerate(sizes, start=1):
    for block in range(1, blocks + 1):
      paths += [
        (f"stage{stage}_block{block}", layer)
        for layer in order
        if block == 1 or not layer.startswith("shortcut")
      ]
  if name in _FIRST_LACKS:
    paths.remove(("stage1_block1", _FIRST_LACKS[name]))
  return [*paths, ("final_bn",)] if name == "resnet_v2" else paths


def _in_turn(
  ours: Sequence[Path], head: str, theirs: Callable[[str], Iterable[str]]
) -> dict[Path, str]:
  """Pairs layers by their order; `theirs` gives the names of a class."""
  names: dict[Path, str] = {("head",): head}
  for part, kind in _KINDS:
    paths = [path for path in ours if part in path[-1]]
    names.update(zip(paths, theirs(kind), strict=False))
  return names


def _found(file: files.WeightsFile, kind: str) -> Iterator[str]:
  """Yields the automatic names in a file, then names that it lacks."""
  found = _numbered(file, kind)
  yield from found
  for number in itertools.count(len(found)):
    yield f"{kind} number {number}"


def _application_names(ours: Sequence[Path], head: str) -> dict[Path, str]:
  """Names such as 'conv2_block1_0_conv' for stage1_block1's shortcut_conv."""
  names: dict[Path, str] = {("head",): head}
  for path in ours:
    *block, layer = path
    kind = "conv" if "conv" in layer else "bn"
    prefix = "conv1"
    if block:
      stage, number = re.findall(r"\d+", block[0])
      within = 0 if layer.startswith("shortcut") else layer[-1]
      prefix = f"conv{int(stage) + 1}_block{number}_{within}"
    names[path] = f"{prefix}_{kind}"
  return names


def _origin(theirs: Names, path: Path, flip_stem: bool = False) -> Origin:
  *layer, leaf = path[1:]
  name = f"{theirs[tuple(layer)]}/{_NORM[leaf] if 'bn' in layer[-1] else leaf}"
  if flip_stem and path[1:] == ("stem_conv", "kernel"):
    return Origin(name, _flip_channels, _flip_channels)
  return Origin(name)


def _flip_channels(kernel: np.ndarray) -> np.ndarray:
  return kernel[:, :, ::-1]


# ---- Export


def layers_of(model: ConfigDict) -> dict[Path, tuple[str, str]]:
  """Maps our layers of `config.model` to names and places in Keras's files.

  A place is for example 'conv2d_3', numbered in the order of `model.layers`.
  """
  created, in_model = (
    _ours(model.name, model.depth, as_created) for as_created in (True, False)
  )
  places = _in_turn(in_model, "dense", files.automatic_names)
  if model.name == "resnet_imagenet":
    names = _application_names(created, _HEADS[0])
  else:
    names = _in_turn(created, "dense", files.automatic_names)
  return {path: (name, places[path]) for path, name in names.items()}


def origin_of(names: str, model: ConfigDict) -> OriginOf | None:
  """See `pytorch_names.origin_of`; `names` is 'keras'."""
  if names != "keras" or model.name not in _BLOCKS:
    return None
  theirs = {path: name for path, (name, _) in layers_of(model).items()}
  flips = model.name == "resnet_imagenet"
  return functools.partial(_origin, theirs, flip_stem=flips)


# ---- What a file says about its layers

# The classes of layers in the networks. A layer of another class, such as one
# that rescales images, changes the logits, and has no weights to show it.
_CLASSES = (
  *("Conv2D", "Dense", "BatchNormalization"),
  *("Activation", "Add", "Dropout", "Flatten", "InputLayer", "ReLU"),
  *("AveragePooling2D", "GlobalAveragePooling2D", "MaxPooling2D"),
  "ZeroPadding2D",
)
# Defaults of settings that some classes or some versions of Keras lack.
_USUAL = {
  "activation": "linear",
  **{"dilation_rate": [1, 1], "groups": 1},
  **{"max_value": None, "negative_slope": 0.0, "threshold": 0.0},
}
_PLAIN_RELU = {
  "max_value": (None,),
  "negative_slope": (0.0, None),
  "threshold": (0.0, None),
}


def _epsilon(file: files.WeightsFile, usual: float) -> float:
  """The batch norms' epsilon; the usual one if the file has none."""
  found = {
    float(layer["config"]["epsilon"])
    for layer in file.layers
    if layer["class_name"] == "BatchNormalization"
  }
  if len(found) > 1:
    raise errors.WeightsError(
      f"{file.path} has batch norms of different epsilons"
      f" {sorted(found)}. They must all be equal."
    )
  return found.pop() if found else usual


def _check_layers(
  file: files.WeightsFile,
  theirs: Names,
  *,
  padding: str | None,
  stem_strides: int,
) -> None:
  """Checks that our layers match the file's description of them, if any."""
  paths = {name: path for path, name in theirs.items()}
  for layer in file.layers:
    kind, has = layer["class_name"], _USUAL | layer["config"]
    what = f"{file.path}: the layer {has['name']}"
    if kind not in _CLASSES:
      raise errors.WeightsError(
        f"{what} is a {kind}, which our networks do not have."
      )
    allowed: dict[str, tuple[Any, ...]] = {"activation": ("linear",)}
    if kind == "Dense" or (kind == "Activation" and layer is file.layers[-1]):
      # A softmax may follow the head: it makes probabilities of the logits.
      allowed["activation"] = ("linear", "softmax")
    elif kind == "Activation":
      allowed["activation"] = ("relu",)
    elif kind == "ReLU":
      allowed |= _PLAIN_RELU
    elif kind == "Conv2D" and has["name"] in paths:
      strides = _strides(paths[has["name"]], stem_strides)
      allowed |= {"strides": ([strides, strides],)}
      allowed |= {"padding": (padding,)} if padding else {}
      allowed |= {"dilation_rate": ([1, 1],), "groups": (1,)}
    for key, values in allowed.items():
      if has[key] not in values:
        raise errors.WeightsError(
          f"{what} has the {key} {has[key]}, which must be"
          f" {' or '.join(map(str, values))}."
        )


def _strides(path: Path, stem_strides: int) -> int:
  if path == ("stem_conv",):
    return stem_strides
  # In every family, the first convolution of a stage halves the image.
  halves = path[0] != "stage1_block1" and path[0].endswith("_block1")
  return 2 if halves and path[1] in ("conv1", "shortcut_conv") else 1
