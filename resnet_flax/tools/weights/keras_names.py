"""Keras's names: the CIFAR-10 example's networks and `keras.applications`.

Sources: the layers of the Keras example (ResNet v1 and v2 for CIFAR-10), which
have automatic names, and those of `keras.applications`' ResNet50, 101 and 152.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from resnet_flax.models import other_blocks as others
from resnet_flax.run import config as config_rules, errors
from resnet_flax.tools.weights import files, mapping
from resnet_flax.tools.weights.mapping import Origin, Path, Source, shape_of

# The name of each layer of ours, for example ('stage1_block1', 'conv1'), in a
# file.
Names = Mapping[Path, str]

_NORM = {
  "scale": "gamma",
  "bias": "beta",
  "mean": "moving_mean",
  "var": "moving_variance",
}
# In older files the head is called after what it gives.
_HEADS = ("predictions", "probs")
# Parts of our layers' names, and the automatic names of such layers.
_KINDS = (("conv", "conv2d"), ("bn", "batch_normalization"))


def identify(file: files.WeightsFile) -> Source:
  """What a file with Keras's names is of.

  Raises:
    WeightsError: none of the networks that are known.
  """
  kernels = [v for k, v in file.arrays.items() if k.endswith("/kernel")]
  if any(array.shape[:2] == (7, 7) for array in kernels):
    return _applications(file)
  if _numbered(file, "conv2d") and len(_numbered(file, "dense")) == 1:
    return _example(file)
  some = ", ".join(sorted(file.arrays)[:5])
  raise errors.WeightsError(
    f"{file.path} is of no network that is known: with Keras's names these are"
    " the CIFAR-10 example's ResNet v1 and v2 and keras.applications' ResNet50,"
    f" ResNet101 and ResNet152, with their heads. It has: {some or 'none'}."
  )


def _numbered(file: files.WeightsFile, kind: str) -> list[str]:
  """The layers with an automatic name, in the order of their numbers.

  The numbers go on over all models of a process, so they may start anywhere.
  """
  found = [name for name in _layers(file) if files.layer_class(name) == kind]
  return sorted(found, key=_number)


def _layers(file: files.WeightsFile) -> set[str]:
  return {name.partition("/")[0] for name in file.arrays}


def _number(name: str) -> int:
  match = re.search(r"_(\d{1,9})$", name)
  return int(match[1]) if match else 0


# ---- The networks


def _example(file: files.WeightsFile) -> Source:
  convs = _numbered(file, "conv2d")
  (head,) = _numbered(file, "dense")
  # A bottleneck begins with a 1x1 convolution.
  is_v2 = shape_of(file, f"{convs[:2][-1]}/kernel")[:2] == (1, 1)
  version, projections = ("v2", 3) if is_v2 else ("v1", 2)
  per_group = _PER_GROUP[f"resnet_{version}"]
  # The stem and the projections are no part of the groups.
  blocks, rest = divmod(len(convs) - 1 - projections, per_group)
  if rest or blocks < 1:
    raise errors.WeightsError(
      f"{file.path} has {len(convs)} convolutions, as no ResNet"
      f" {version} of the Keras example has: for n blocks in"
      f" each stage there are {per_group}n+{1 + projections}."
    )
  depth = per_group * blocks + 2
  ours = _example_layers(f"resnet_{version}", depth, file.has_layer_names)
  theirs = _in_turn(file, ours, head)
  _check_layers(file, theirs, padding="same", stem_strides=1)
  return Source(
    f"the Keras example's ResNet-{depth} {version}",
    {
      "model.name": (f"resnet_{version}",),
      "model.depth": (depth,),
      "model.num_filters": mapping.width(
        shape_of(file, f"{convs[0]}/kernel")[-1], usual=16
      ),
      "model.shortcut": ("keras", "default"),
      "model.padding": ("same",),
      "model.conv_bias": (True,),
      "model.batch_norm_epsilon": (_epsilon(file, usual=1e-3),),
      # What the example has a switch for.
      "normalization": ("pixel_mean", "none"),
    },
    shape_of(file, f"{head}/bias")[-1],
    functools.partial(_origin, theirs),
  )


def _applications(file: files.WeightsFile) -> Source:
  layers = _layers(file)
  num_convs = sum(1 for array in file.arrays.values() if array.ndim == 4)
  if file.has_layer_names:
    is_v2 = "post_bn" in layers or "conv2_block1_preact_bn" in layers
  else:
    is_v2 = len(_numbered(file, "batch_normalization")) != num_convs
  if is_v2:
    raise errors.WeightsError(
      f"{file.path} holds a ResNet V2 of keras.applications, which does not"
      " fit: its strides are in the last block of a stage and its shortcuts"
      " project what is activated already. Take ResNet50, ResNet101 or"
      " ResNet152."
    )
  # The head counts, a projection in each of four stages does not.
  depth = num_convs + 1 - 4
  if depth < others.FIRST_BOTTLENECK or depth not in others.IMAGENET_SIZES:
    raise errors.WeightsError(
      f"{file.path} has {num_convs} convolutions, as none of"
      " keras.applications' ResNet50, ResNet101 and ResNet152 has."
    )

  ours = _application_layers(depth)
  if file.has_layer_names:
    head = next((name for name in _HEADS if name in layers), _HEADS[0])
    theirs = {path: _application_name(path) for path in ours}
    theirs[("head",)] = head
  else:
    head = next(iter(_numbered(file, "dense")), "dense")
    theirs = _in_turn(file, ours, head)
  _check_layers(file, theirs, padding=None, stem_strides=2)
  stem = theirs[("stem_conv",)]
  return Source(
    f"keras.applications' ResNet{depth}",
    {
      "model.name": ("resnet_imagenet",),
      "model.depth": (depth,),
      "model.num_filters": mapping.width(
        shape_of(file, f"{stem}/bias")[-1], usual=64
      ),
      "model.shortcut": ("B", "default"),
      "model.stride_in_3x3": (False,),
      "model.padding": ("symmetric",),
      "model.conv_bias": (True,),
      "model.batch_norm_epsilon": (_epsilon(file, usual=1.001e-5),),
      "normalization": ("caffe",),
    },
    shape_of(file, f"{head}/bias")[-1],
    functools.partial(_origin, theirs, flip_stem=True),
  )


# ---- Our layers and theirs

# For each network of the example, by how many layers a block of each stage adds
# to its depth.
_PER_GROUP = {"resnet_v1": 6, "resnet_v2": 9}


def _example_layers(name: str, depth: int, as_created: bool) -> list[Path]:
  """In the order in which they are created, or of `model.layers`."""

  def v1_block(stage: int, block: int) -> list[str]:
    projects = stage > 1 and block == 1
    return ["conv1", "bn1", "conv2", "bn2"] + ["shortcut_conv"] * projects

  def v2_block(stage: int, block: int) -> list[str]:
    layers = ["bn1", "conv1", "bn2", "conv2", "bn3", "conv3"]
    if stage == block == 1:
      del layers[0]
    if block == 1:
      # It is created last, but comes before conv3 in `model.layers`.
      at = len(layers) if as_created else -1
      layers[at:at] = ["shortcut_conv"]
    return layers

  sizes = [(depth - 2) // _PER_GROUP[name]] * 3
  if name == "resnet_v1":
    return _in_order(sizes, v1_block)
  return [*_in_order(sizes, v2_block), ("final_bn",)]


def _application_layers(depth: int) -> list[Path]:
  def block_layers(stage: int, block: int) -> list[str]:
    del stage
    shortcut = ["shortcut_conv", "shortcut_bn"] if block == 1 else []
    return ["conv1", "bn1", "conv2", "bn2", *shortcut, "conv3", "bn3"]

  return _in_order(others.IMAGENET_SIZES[depth], block_layers)


def _in_order(
  sizes: Sequence[int], block_layers: Callable[[int, int], list[str]]
) -> list[Path]:
  """Our stem and blocks; `block_layers` orders those of a stage's block."""
  return [
    ("stem_conv",),
    ("stem_bn",),
    *(
      (f"stage{stage}_block{block}", layer)
      for stage, blocks in enumerate(sizes, start=1)
      for block in range(1, blocks + 1)
      for layer in block_layers(stage, block)
    ),
  ]


def _in_turn(
  file: files.WeightsFile, ours: Sequence[Path], head: str
) -> dict[Path, str]:
  """Pairs layers by their order; those without one get a name to miss."""
  names: dict[Path, str] = {("head",): head}
  for part, kind in _KINDS:
    paths = [path for path in ours if part in path[-1]]
    theirs = _numbered(file, kind)
    theirs += [f"{kind} number {k}" for k in range(len(theirs), len(paths))]
    names.update(zip(paths, theirs, strict=False))
  return names


def _application_name(path: Path) -> str:
  """'conv2_block1_0_conv' for stage1_block1's shortcut_conv."""
  *block, layer = path
  kind = "conv" if "conv" in layer else "bn"
  if not block:
    return f"conv1_{kind}"
  stage, number = re.findall(r"\d+", block[0])
  within = 0 if layer.startswith("shortcut") else layer[-1]
  return f"conv{int(stage) + 1}_block{number}_{within}_{kind}"


def _automatic(ours: Sequence[Path]) -> dict[Path, str]:
  """The names that layers in this order have in a process's first model."""
  names: dict[Path, str] = {("head",): "dense"}
  for part, kind in _KINDS:
    paths = [path for path in ours if part in path[-1]]
    names |= {p: f"{kind}_{k}" if k else kind for k, p in enumerate(paths)}
  return names


def _origin(theirs: Names, path: Path, flip_stem: bool = False) -> Origin:
  *layer, leaf = path[1:]
  flips = flip_stem and path[1:] == ("stem_conv", "kernel")
  return Origin(
    f"{theirs[tuple(layer)]}/{_NORM[leaf] if 'bn' in layer[-1] else leaf}",
    (lambda kernel: kernel[:, :, ::-1]) if flips else mapping.as_it_is,
  )


# ---- The way out


def layers_of(model: ConfigDict) -> dict[Path, tuple[str, str]]:
  """The layers of Keras's network that `config.model` describes, by ours.

  Of each its name and its place in a file, 'conv2d_3': those of a class are
  numbered in the order of `model.layers`.
  """
  if model.name in _PER_GROUP:
    names, places = (
      _automatic(_example_layers(model.name, model.depth, as_created))
      for as_created in (True, False)
    )
  else:
    places = _automatic(_application_layers(model.depth))
    names = {path: _application_name(path) for path in places}
    names[("head",)] = _HEADS[0]
  return {path: (name, places[path]) for path, name in names.items()}


def _origin_of(model: ConfigDict) -> mapping.OriginOf:
  names = {path: name for path, (name, _) in layers_of(model).items()}
  flips = model.name == "resnet_imagenet"
  return functools.partial(_origin, names, flip_stem=flips)


# See `pytorch_names.ORIGINS`.
ORIGINS: dict[tuple[str, str], Callable[[ConfigDict], mapping.OriginOf]] = {
  ("keras", name): _origin_of for name in (*_PER_GROUP, "resnet_imagenet")
}

# ---- What a file says of its layers

# What the networks are built of. A layer of another class, as one that rescales
# images, changes logits and has no weights that would show it.
_CLASSES = (
  *("Conv2D", "Dense", "BatchNormalization"),
  *("Activation", "Add", "Dropout", "Flatten", "InputLayer", "ReLU"),
  *("AveragePooling2D", "GlobalAveragePooling2D", "MaxPooling2D"),
  "ZeroPadding2D",
)
# What may follow the head: what makes probabilities of logits.
_LAST_ACTIVATIONS = ("linear", "softmax")


def _epsilon(file: files.WeightsFile, usual: float) -> float:
  """The batch norms' epsilon; the usual one if the file does not tell."""
  found = {
    float(layer.settings["epsilon"])
    for layer in file.layers
    if layer.kind == "BatchNormalization"
  }
  for epsilon in found:
    try:
      config_rules.KEYS["model.batch_norm_epsilon"].check(epsilon)
    except errors.ConfigError as error:
      raise errors.WeightsError(
        f"{file.path} has a batch norm that ours cannot be: {error}"
      ) from error
  if len(found) > 1:
    raise errors.WeightsError(
      f"{file.path} has batch norms of different epsilons"
      f" {sorted(found)}; needed: the same in all."
    )
  return found.pop() if found else usual


def _check_layers(
  file: files.WeightsFile,
  theirs: Names,
  *,
  padding: str | None,
  stem_strides: int,
) -> None:
  """Checks that what the file says of its layers, if it does, is so in ours."""
  paths = {name: path for path, name in theirs.items()}
  for layer in file.layers:
    wrong = _wrong_activation(layer, is_last=layer is file.layers[-1])
    if not wrong and layer.kind == "Conv2D" and layer.name in paths:
      strides = _strides(paths[layer.name], stem_strides)
      wrong = _wrong_conv(layer.settings, strides, padding)
    if wrong:
      raise errors.WeightsError(f"{file.path}: the layer {layer.name} {wrong}.")


def _wrong_activation(layer: files.Layer, *, is_last: bool) -> str | None:
  has = layer.settings
  if layer.kind not in _CLASSES:
    return f"is a {layer.kind}, which our networks do not have"
  allowed: tuple[str, ...] = ("linear",)
  if layer.kind == "Dense" or (layer.kind == "Activation" and is_last):
    allowed = _LAST_ACTIVATIONS
  elif layer.kind == "Activation":
    allowed = ("relu",)
  if (activation := has.get("activation", "linear")) not in allowed:
    ours = " or ".join(allowed)
    return f"has the activation {activation} where ours has {ours}"
  is_plain = has.get("max_value") is None and not (
    has.get("negative_slope") or has.get("threshold")
  )
  if layer.kind == "ReLU" and not is_plain:
    return "is a ReLU with a slope, a threshold or a largest value"
  return None


def _wrong_conv(
  has: Mapping[str, Any], strides: int, padding: str | None
) -> str | None:
  if has["strides"] != [strides] * 2:
    return f"has strides {has['strides']} where ours has {strides}"
  if padding and has["padding"] != padding:
    return f"has the padding {has['padding']!r}, not {padding!r}"
  # Files of Kerases that had no groups do not name them.
  for key, ours in (("dilation_rate", [1, 1]), ("groups", 1)):
    if has.get(key, ours) != ours:
      return f"has {key} {has[key]} where ours has {ours}"
  return None


def _strides(path: Path, stem_strides: int) -> int:
  if path == ("stem_conv",):
    return stem_strides
  # Whatever the family, the first convolution of a stage halves the image.
  halves = path[0] != "stage1_block1" and path[0].endswith("_block1")
  return 2 if halves and path[1] in ("conv1", "shortcut_conv") else 1
