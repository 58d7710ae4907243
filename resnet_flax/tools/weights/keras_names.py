"""Keras's names: the CIFAR-10 example's networks and `keras.applications`.

Sources: the layers of the Keras example (ResNet v1 and v2 for CIFAR-10), which
have automatic names, and those of `keras.applications`' ResNet50, 101 and 152.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from resnet_flax.models import registry
from resnet_flax.run import config as config_rules, errors
from resnet_flax.tools.weights import files
from resnet_flax.tools.weights.mapping import (
  Origin,
  Path,
  Source,
  as_it_is,
  width,
)

_VARIABLES = {
  "conv2d": {"kernel": "kernel", "bias": "bias"},
  "dense": {"kernel": "kernel", "bias": "bias"},
  "batch_normalization": {
    "scale": "gamma",
    "bias": "beta",
    "mean": "moving_mean",
    "var": "moving_variance",
  },
}

_APPLICATIONS = {
  depth: sizes
  for depth, sizes in registry.IMAGENET_SIZES.items()
  if depth >= registry.FIRST_BOTTLENECK
}
# In older files the head is called after what it gives.
_HEADS = ("predictions", "probs")
_BOTTLENECK = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")


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
  layers = {name.partition("/")[0] for name in file.arrays}
  found = [name for name in layers if files.layer_class(name) == kind]
  return sorted(found, key=_number)


def _number(name: str) -> int:
  match = re.search(r"_(\d{1,9})$", name)
  return int(match[1]) if match else 0


def _example(file: files.WeightsFile) -> Source:
  convs = _numbered(file, "conv2d")
  norms = _numbered(file, "batch_normalization")
  (head,) = _numbered(file, "dense")
  shapes = [_shape(file, f"{name}/kernel") for name in convs[:2]]
  is_v2 = shapes[-1][:2] == (1, 1)
  name, per_group, projections = (
    ("resnet_v2", 9, 3) if is_v2 else ("resnet_v1", 6, 2)
  )
  # The stem and the projections are no part of the groups.
  blocks, rest = divmod(len(convs) - 1 - projections, per_group)
  if rest or blocks < 1:
    raise errors.WeightsError(
      f"{file.path} has {len(convs)} convolutions, as no ResNet"
      f" {'v2' if is_v2 else 'v1'} of the Keras example has: for n blocks in"
      f" each stage there are {per_group}n+{1 + projections}."
    )
  depth = per_group * blocks + 2
  makes = _v2_layers if is_v2 else _v1_layers
  ours = list(makes(blocks, file.has_layer_names))
  theirs = {
    **_in_turn("conv2d", [p for p in ours if "conv" in p[-1]], convs),
    **_in_turn(
      "batch_normalization", [p for p in ours if "bn" in p[-1]], norms
    ),
    ("head",): ("dense", head),
  }
  _check_layers(file, theirs, padding="same", stem_strides=1)
  return Source(
    f"the Keras example's ResNet-{depth} {name.removeprefix('resnet_')}",
    {
      "model.name": (name,),
      "model.depth": (depth,),
      "model.num_filters": width(shapes[0][-1], usual=16),
      "model.shortcut": ("keras", "default"),
      "model.padding": ("same",),
      "model.conv_bias": (True,),
      "model.norm": ("batch_norm",),
      "model.batch_norm_epsilon": (_epsilon(file, usual=1e-3),),
      # What the example has a switch for.
      "normalization": ("pixel_mean", "none"),
    },
    _num_classes(file, head),
    lambda path: _origin(theirs, path),
  )


def _v1_layers(blocks: int, created: bool) -> Iterator[Path]:
  """Our layers in the order of the example's."""
  del created  # It is the same one.
  yield from [("stem_conv",), ("stem_bn",)]
  for stage in range(3):
    for block in range(blocks):
      layers = ["conv1", "bn1", "conv2", "bn2"]
      if stage > 0 and block == 0:
        layers.append("shortcut_conv")
      yield from ((_block(stage, block), layer) for layer in layers)
  yield ("head",)


def _v2_layers(blocks: int, created: bool) -> Iterator[Path]:
  """Our layers in the order of the example's."""
  yield from [("stem_conv",), ("stem_bn",)]
  for stage in range(3):
    for block in range(blocks):
      layers = ["bn1", "conv1", "bn2", "conv2", "bn3", "conv3"]
      if stage == block == 0:
        del layers[0]
      if block == 0:
        layers.insert(len(layers) - (not created), "shortcut_conv")
      yield from ((_block(stage, block), layer) for layer in layers)
  yield from [("final_bn",), ("head",)]


def _block(stage: int, block: int) -> str:
  return f"stage{stage + 1}_block{block + 1}"


def _applications(file: files.WeightsFile) -> Source:
  layers = {name.partition("/")[0] for name in file.arrays}
  num_convs = sum(1 for k, v in file.arrays.items() if v.ndim == 4)
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
  # The stem, and a projection in each of four stages.
  depth = num_convs - 4 + 1
  if depth not in _APPLICATIONS:
    raise errors.WeightsError(
      f"{file.path} has {num_convs} convolutions, as none of"
      " keras.applications' ResNet50, ResNet101 and ResNet152 has."
    )
  sizes = _APPLICATIONS[depth]
  if file.has_layer_names:
    head = next((name for name in _HEADS if name in layers), _HEADS[0])
    theirs = _application_names(sizes, head)
  else:
    dense = _numbered(file, "dense")
    head = dense[0] if dense else "dense"
    theirs = _application_numbers(file, sizes, head)
  _check_layers(file, theirs, padding=None, stem_strides=2)
  return Source(
    f"keras.applications' ResNet{depth}",
    {
      "model.name": ("resnet_imagenet",),
      "model.depth": (depth,),
      "model.num_filters": width(
        _shape(file, theirs[("stem_conv",)][1] + "/bias")[-1], usual=64
      ),
      "model.shortcut": ("B", "default"),
      "model.stride_in_3x3": (False,),
      "model.padding": ("symmetric",),
      "model.conv_bias": (True,),
      "model.batch_norm_epsilon": (_epsilon(file, usual=1.001e-5),),
      "normalization": ("caffe",),
    },
    _num_classes(file, head),
    lambda path: _origin(theirs, path, flip_stem=True),
  )


def _application_names(
  sizes: tuple[int, ...], head: str
) -> dict[Path, tuple[str, str]]:
  """For our layers the kinds and names of theirs."""
  theirs: dict[Path, tuple[str, str]] = {
    ("stem_conv",): ("conv2d", "conv1_conv"),
    ("stem_bn",): ("batch_normalization", "conv1_bn"),
    ("head",): ("dense", head),
  }
  for stage, blocks in enumerate(sizes):
    for block in range(blocks):
      prefix = f"conv{stage + 2}_block{block + 1}"
      for k, layer in ((0, "shortcut_"), (1, ""), (2, ""), (3, "")):
        if k == 0 and block > 0:
          continue
        number = str(k or "")
        path = _block(stage, block)
        theirs[path, f"{layer}conv{number}"] = "conv2d", f"{prefix}_{k}_conv"
        theirs[path, f"{layer}bn{number}"] = (
          "batch_normalization",
          f"{prefix}_{k}_bn",
        )
  return theirs


def _application_numbers(
  file: files.WeightsFile, sizes: tuple[int, ...], head: str
) -> dict[Path, tuple[str, str]]:
  """The same where layers have no names, by the order of `model.layers`."""
  ours: list[Path] = [("stem_conv",), ("stem_bn",)]
  for stage, blocks in enumerate(sizes):
    for block in range(blocks):
      layers = list(_BOTTLENECK)
      if block == 0:
        layers[4:4] = ["shortcut_conv", "shortcut_bn"]
      ours += [(_block(stage, block), layer) for layer in layers]
  return {
    **_in_turn(
      "conv2d",
      [path for path in ours if "conv" in path[-1]],
      _numbered(file, "conv2d"),
    ),
    **_in_turn(
      "batch_normalization",
      [path for path in ours if "bn" in path[-1]],
      _numbered(file, "batch_normalization"),
    ),
    ("head",): ("dense", head),
  }


def _in_turn(
  kind: str, ours: list[Path], theirs: list[str]
) -> dict[Path, tuple[str, str]]:
  """Pairs layers in their order; those without one get a name to miss."""
  missing = [f"{kind} number {k}" for k in range(len(theirs), len(ours))]
  names = [*theirs, *missing][: len(ours)]
  return {path: (kind, name) for path, name in zip(ours, names, strict=True)}


def _origin(
  theirs: Mapping[Path, tuple[str, str]], path: Path, flip_stem: bool = False
) -> Origin:
  """Where an array comes from."""
  *layer, leaf = path[1:]
  kind, name = theirs[tuple(layer)]
  flips = flip_stem and path[1:] == ("stem_conv", "kernel")
  layout = _flip_inputs if flips else as_it_is
  return Origin(f"{name}/{_VARIABLES[kind][leaf]}", layout)


def _flip_inputs(array: np.ndarray) -> np.ndarray:
  return array[:, :, ::-1]


def _shape(file: files.WeightsFile, name: str) -> tuple[int, ...]:
  shape = file.arrays[name].shape if name in file.arrays else ()
  return shape or (0,)


def _num_classes(file: files.WeightsFile, head: str) -> int:
  return _shape(file, f"{head}/bias")[-1]


# What the networks are built of. A layer of another class, as one that rescales
# images, changes logits and has no weights that would show it.
_CLASSES = frozenset(
  (
    "Activation",
    "Add",
    "AveragePooling2D",
    "BatchNormalization",
    "Conv2D",
    "Dense",
    "Dropout",
    "Flatten",
    "GlobalAveragePooling2D",
    "InputLayer",
    "MaxPooling2D",
    "ReLU",
    "ZeroPadding2D",
  )
)
# What may follow a layer's own sum, and be a layer of its own: inside only the
# ReLUs that ours has too, at the end what makes probabilities of logits.
_LAYER_ACTIVATIONS = {"Dense": ("linear", "softmax")}
_INNER_ACTIVATIONS = ("relu",)
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
  theirs: Mapping[Path, tuple[str, str]],
  *,
  padding: str | None,
  stem_strides: int,
) -> None:
  """Checks what the file says of its layers, if it does.

  Raises:
    WeightsError: they do not compute what ours do.
  """
  paths = {name: path for path, (_, name) in theirs.items()}
  for layer in file.layers:
    name, found = layer.name, layer.settings
    wrong = None
    if layer.kind == "Activation":
      is_last = layer is file.layers[-1]
      allowed = _LAST_ACTIVATIONS if is_last else _INNER_ACTIVATIONS
    else:
      allowed = _LAYER_ACTIVATIONS.get(layer.kind, ("linear",))
    if layer.kind not in _CLASSES:
      wrong = f"is a {layer.kind}, which our networks do not have"
    elif (activation := found.get("activation", "linear")) not in allowed:
      wrong = (
        f"has the activation {activation} where ours has {' or '.join(allowed)}"
      )
    elif layer.kind == "ReLU" and not _is_plain(found):
      wrong = "is a ReLU with a slope, a threshold or a largest value"
    elif layer.kind == "Conv2D" and name in paths:
      strides = _strides(paths[name], stem_strides)
      if found["strides"] != [strides] * 2:
        wrong = f"has strides {found['strides']} where ours has {strides}"
      elif padding and found["padding"] != padding:
        wrong = f"has the padding {found['padding']!r}, not {padding!r}"
      # Files of Kerases that had no groups do not name them.
      for key, ours in (("dilation_rate", [1, 1]), ("groups", 1)):
        if found.get(key, ours) != ours:
          wrong = f"has {key} {found[key]} where ours has {ours}"
    if wrong:
      raise errors.WeightsError(f"{file.path}: the layer {name} {wrong}.")


def _is_plain(relu: Mapping[str, Any]) -> bool:
  has_slope = relu.get("negative_slope") or relu.get("threshold")
  return relu.get("max_value") is None and not has_slope


def _strides(path: Path, stem_strides: int) -> int:
  if path == ("stem_conv",):
    return stem_strides
  # Whatever the family, the first convolution of a stage halves the image.
  halves = path[0] != _block(0, 0) and path[0].endswith("_block1")
  return 2 if halves and path[1] in ("conv1", "shortcut_conv") else 1
