"""Keras's names: the CIFAR-10 example's networks and `keras.applications`.

Sources: the layers of the Keras example (ResNet v1 and v2 for CIFAR-10), which
have automatic names, and `keras.applications`' ResNet50, ResNet101, ResNet152.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from resnet_flax.models import other_blocks as others, registry
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
# Maps our layers' names, less prefix and number, to Keras's classes.
_CLASSES = {"conv": "conv2d", "bn": "batch_normalization", "head": "dense"}

# The layers of a block in the order in which they are created. Only the first
# block of a stage has shortcut layers.
_BLOCKS = {
  "resnet_v1": "conv1 bn1 conv2 bn2 shortcut_conv",
  "resnet_v2": "bn1 conv1 bn2 conv2 bn3 conv3 shortcut_conv",
  "resnet_imagenet": (
    "conv1 bn1 conv2 bn2 shortcut_conv shortcut_bn conv3 bn3"
  ),
}


def identify(file: files.WeightsFile) -> Source:
  """Finds the network of a file with Keras's names."""
  numbered = _numbered(file)
  kernels = [v for k, v in file.arrays.items() if k.endswith("/kernel")]
  is_imagenet = any(array.shape[:2] == (7, 7) for array in kernels)
  if is_imagenet:
    # The depth counts the head, but not the projection of each of four stages.
    name, depth = "resnet_imagenet", file.num_convs + 1 - 4
    if depth < others.FIRST_BOTTLENECK or depth not in others.IMAGENET_SIZES:
      raise errors.WeightsError(
        f"{file.path} has {file.num_convs} convolutions. It must be ResNet50,"
        " ResNet101 or ResNet152 of keras.applications."
      )
    if "post_bn/gamma" in file.arrays:
      raise errors.WeightsError(
        f"{file.path} is a ResNet V2 of keras.applications, which fits no"
        " network here. Pass keras.applications' ResNet50, ResNet101 or 152."
      )
    title, width, epsilon = f"keras.applications' ResNet{depth}", 64, 1.001e-5
    needed: dict[str, Any] = {"normalization": ("caffe",)}
    needed |= {"shortcut": ("B", "default")}
    needed |= {"padding": "symmetric", "stride_in_3x3": False}
  elif {"conv2d", "dense"} <= numbered.keys() and "dense_1" not in numbered:
    name, depth = _example(file, numbered)
    title = f"the Keras example's ResNet-{depth} {name.removeprefix('resnet_')}"
    width, epsilon = 16, 1e-3
    # In the example, subtracting the mean image is optional.
    needed = {"normalization": ("pixel_mean", "none"), "padding": "same"}
    needed |= {"shortcut": ("keras", "default")}
  else:
    raise mapping.unknown_network(
      file,
      "with Keras's names these are the CIFAR-10 example's ResNet v1 and v2"
      " and keras.applications' ResNet50, ResNet101 and ResNet152, with their"
      " heads",
    )
  if is_imagenet and file.has_layer_names:
    # Older files call the head 'probs'.
    head = "probs" if "probs/bias" in file.arrays else "predictions"
    theirs = _application_names(depth, head)
  else:
    places = automatic_names(name, depth, file.has_layer_names)
    theirs = {k: numbered[v] for k, v in places.items() if v in numbered}
  for layer in file.layers:
    if layer["class_name"] == "BatchNormalization":
      epsilon = float(layer["config"]["epsilon"])
  _check_layers(file, theirs, epsilon, is_imagenet)
  stem, head = (theirs.get((layer,), "") for layer in ("stem_conv", "head"))
  return Source(
    title,
    file.shape(f"{head}/bias")[-1],
    functools.partial(_origin, theirs, flip_stem=is_imagenet),
    name=name,
    depth=depth,
    num_filters=mapping.allowed_widths(file.shape(f"{stem}/kernel")[-1], width),
    conv_bias=True,
    batch_norm_epsilon=epsilon,
    **needed,
  )


def _numbered(file: files.WeightsFile) -> dict[str, str]:
  """Maps 'conv2d', 'conv2d_1', ... to the file's layers in their order.

  Keras counts over all models of a process, so numbers may start anywhere.
  """
  layers = {name.partition("/")[0] for name in file.arrays}
  in_turn = sorted(layers, key=lambda name: (len(name), name))
  automatic = files.automatic_names(map(files.layer_class, in_turn))
  return dict(zip(automatic, in_turn, strict=True))


def _example(
  file: files.WeightsFile, numbered: Mapping[str, str]
) -> tuple[str, int]:
  """The name and the depth of the example's network that a file holds."""
  # A bottleneck begins with a 1x1 convolution.
  is_v2 = file.shape(f"{numbered.get('conv2d_1')}/kernel")[:2] == (1, 1)
  version, per_n, projections = ("v2", 9, 3) if is_v2 else ("v1", 6, 2)
  # The stem and the projections are not among these layers.
  blocks, rest = divmod(file.num_convs - 1 - projections, per_n)
  if rest or blocks < 1:
    raise errors.WeightsError(
      f"{file.path} has {file.num_convs} convolutions. A ResNet {version} of"
      f" the Keras example must have {per_n}n+{1 + projections}, for n blocks"
      " in each stage."
    )
  return f"resnet_{version}", per_n * blocks + 2


# ---- Our layers and theirs


def automatic_names(
  name: str, depth: int, as_created: bool = True
) -> dict[Path, str]:
  """Maps the layers of our network to names such as 'conv2d_3'.

  Keras numbers a class's layers as they are created, and, for their places in a
  file, in the order of `model.layers`.
  """
  order = _BLOCKS[name].split()
  if name == "resnet_v2" and not as_created:
    # The shortcut is created last, but precedes conv3 in `model.layers`.
    order[-2:] = ["shortcut_conv", "conv3"]
  paths: list[Path] = [("stem_conv",), ("stem_bn",)]
  sizes = registry.check_depth(name, depth)
  for stage, blocks in enumerate(sizes, start=1):
    for block in range(1, blocks + 1):
      paths += [
        (f"stage{stage}_block{block}", layer)
        for layer in order
        if block == 1 or not layer.startswith("shortcut")
      ]
  if name == "resnet_v1":
    paths.remove(("stage1_block1", "shortcut_conv"))
  elif name == "resnet_v2":
    paths.remove(("stage1_block1", "bn1"))
    paths.append(("final_bn",))
  paths.append(("head",))
  classes = [_CLASSES[re.sub(".*_|[0-9]", "", path[-1])] for path in paths]
  return dict(zip(paths, files.automatic_names(classes), strict=True))


def _application_names(
  depth: int, head: str = "predictions"
) -> dict[Path, str]:
  """Names such as 'conv2_block1_0_conv' for stage1_block1's shortcut_conv."""
  names: dict[Path, str] = {}
  for path in automatic_names("resnet_imagenet", depth):
    *block, layer = path
    kind = "conv" if "conv" in layer else "bn"
    prefix = "conv1"
    if block:
      stage, number = re.findall(r"\d+", block[0])
      within = 0 if layer.startswith("shortcut") else layer[-1]
      prefix = f"conv{int(stage) + 1}_block{number}_{within}"
    names[path] = f"{prefix}_{kind}"
  return names | {("head",): head}


def _origin(theirs: Names, path: Path, flip_stem: bool = False) -> Origin:
  *layer, leaf = path[1:]
  # A layer that their network lacks keeps our name.
  name = theirs.get(tuple(layer), "/".join(layer))
  name = f"{name}/{_NORM[leaf] if 'bn' in layer[-1] else leaf}"
  if flip_stem and path[1:] == ("stem_conv", "kernel"):
    return Origin(name, _flip_channels)
  return Origin(name)


def _flip_channels(kernel: np.ndarray) -> np.ndarray:
  return kernel[:, :, ::-1]


# ---- Export


def names_of(model: ConfigDict) -> dict[Path, str]:
  """Maps our layers of `config.model` to the names that Keras gives them."""
  if model.name == "resnet_imagenet":
    return _application_names(model.depth)
  return automatic_names(model.name, model.depth)


def origin_of(names: str, model: ConfigDict) -> OriginOf | None:
  """See `pytorch_names.origin_of`; `names` is 'keras'."""
  if names != "keras" or model.name not in _BLOCKS:
    return None
  flips = model.name == "resnet_imagenet"
  return functools.partial(_origin, names_of(model), flip_stem=flips)


# ---- What a file says about its layers

# By layer class: allowed values of settings that change logits but no array.
# The first value stands in where a version of Keras lacks the setting.
_SETTINGS: dict[str, dict[str, tuple[Any, ...]]] = {
  "Conv2D": {"activation": ("linear",), "dilation_rate": ([1, 1],)},
  # A softmax after the head only turns the logits into probabilities.
  "Dense": {"activation": ("linear", "softmax")},
  "Activation": {"activation": ("relu",)},
  "ReLU": {
    "max_value": (None,),
    "negative_slope": (0.0, None),
    "threshold": (0.0, None),
  },
}
# Classes without settings to check, or whose settings depend on the file.
_PLAIN = (
  *("BatchNormalization", "Add", "Dropout", "Flatten", "InputLayer"),
  *("AveragePooling2D", "GlobalAveragePooling2D", "MaxPooling2D"),
  "ZeroPadding2D",
)


def _check_layers(
  file: files.WeightsFile, theirs: Names, epsilon: float, is_imagenet: bool
) -> None:
  """Checks that our layers match the file's description of them, if any."""
  paths = {name: path for path, name in theirs.items()}
  for layer in file.layers:
    kind, name = layer["class_name"], layer["config"]["name"]
    what = f"{file.path}: the layer {name}"
    if kind not in (*_SETTINGS, *_PLAIN):
      raise errors.WeightsError(
        f"{what} is a {kind}, which our networks do not have. Pass the network"
        " without added layers."
      )
    if kind == "Activation" and layer is file.layers[-1]:
      kind = "Dense"
    allowed = _SETTINGS.get(kind, {})
    config = {k: usual for k, (usual, *_) in allowed.items()} | layer["config"]
    if kind == "BatchNormalization":
      allowed = {"epsilon": (epsilon,)}
    if kind == "Conv2D" and name in paths:
      # In every family, stages after the first begin with a stride of 2.
      halving = r"stage[2-4]_block1/(conv1|shortcut_conv)"
      halving += "|stem_conv" * is_imagenet
      strides = 2 if re.fullmatch(halving, "/".join(paths[name])) else 1
      allowed = allowed | {"strides": ([strides, strides],)}
      if not is_imagenet:  # ImageNet networks have layers that pad.
        allowed["padding"] = ("same",)
    for key, values in allowed.items():
      if config[key] not in values:
        raise errors.WeightsError(
          f"{what} has the {key} {config[key]}, which must be"
          f" {' or '.join(map(str, values))}."
        )
