"""PyTorch's names: torchvision's networks and the CIFAR ResNets.

Sources: the state dicts of torchvision's resnet.py, vgg.py and alexnet.py, and
of the ResNets for CIFAR-10 that are widely used with PyTorch, whose blocks are
named like torchvision's and whose head is called `linear`.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from resnet_flax.models import other_blocks as others
from resnet_flax.run import errors
from resnet_flax.tools.weights import files, mapping
from resnet_flax.tools.weights.mapping import Origin, Path, Source, shape_of

_NORM = {
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}

# (blocks of each stage, bottlenecks): depth. Those of 34 and 50 layers differ
# only in their blocks.
_IMAGENET_DEPTHS = {
  (sizes, depth >= others.FIRST_BOTTLENECK): depth
  for depth, sizes in others.IMAGENET_SIZES.items()
}

# The convolutions' indexes in `features`.
_VGG19 = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)
_VGG19_BN = (0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49)
_ALEXNET = (0, 3, 6, 8, 10)
# And of the dense layers in `classifier`, and the channels that they are given.
_VGG_DENSE = {"dense1": 0, "dense2": 3, "head": 6}, 512
_ALEXNET_DENSE = {"dense1": 1, "dense2": 4, "head": 6}, 256

# OIHW as HWIO, and back.
_CONV = tuple(
  functools.partial(np.transpose, axes=axes)
  for axes in ((2, 3, 1, 0), (3, 2, 0, 1))
)

_EPSILON = {"model.batch_norm_epsilon": (1e-5,)}
_RESNET = {
  **_EPSILON,
  "model.padding": ("symmetric",),
  "model.conv_bias": (False,),
}


def identify(file: files.WeightsFile) -> Source:
  """What a file with PyTorch's names is of.

  Raises:
    WeightsError: none of the networks that are known.
  """
  names = file.arrays.keys()
  if "classifier.6.weight" in names and "features.0.weight" in names:
    return _feedforward(file)
  if "conv1.weight" in names and "layer1.0.conv1.weight" in names:
    if "fc.weight" in names:
      return _torchvision_resnet(file)
    if "linear.weight" in names and not _blocks(names)[3:]:
      return _cifar_resnet(file)
  some = ", ".join(sorted(names)[:5])
  raise errors.WeightsError(
    f"{file.path} is of no network that is known: with PyTorch's names these"
    " are torchvision's ResNet-18 to 152, wide ones, ResNeXt, VGG-19 and"
    " AlexNet, and CIFAR ResNets with three stages and a head 'linear'."
    f" It has: {some or 'none'}."
  )


def _blocks(names: Any) -> tuple[int, ...]:
  """How many blocks layer1, layer2, ... have."""
  stages: dict[int, set[int]] = {}
  for name in names:
    if match := re.match(r"layer(\d{1,2})\.(\d{1,4})\.", name):
      stages.setdefault(int(match[1]), set()).add(int(match[2]))
  return tuple(len(stages[stage]) for stage in sorted(stages))


def _torchvision_resnet(file: files.WeightsFile) -> Source:
  sizes = _blocks(file.arrays)
  has_bottlenecks = "layer1.0.conv3.weight" in file.arrays
  depth = _IMAGENET_DEPTHS.get((sizes, has_bottlenecks))
  if depth is None:
    raise errors.WeightsError(
      f"{file.path} is a ResNet with {sizes} blocks, which is none of"
      " torchvision's ResNet-18, 34, 50, 101 and 152."
    )
  needed: dict[str, tuple[Any, ...]] = {
    "model.name": ("resnet_imagenet",),
    "model.depth": (depth,),
    "model.num_filters": mapping.width(
      shape_of(file, "conv1.weight")[0], usual=64
    ),
    "model.shortcut": ("B", "default"),
    **_RESNET,
    "normalization": ("imagenet",),
  }
  title = f"torchvision's ResNet-{depth}"
  if has_bottlenecks:
    stem = shape_of(file, "conv1.weight")[0]
    channels, width = shape_of(file, "layer1.0.conv2.weight")[:2]
    groups = channels // max(width, 1)
    # Wide ResNets and ResNeXts are called as torchvision calls the latter.
    if (groups, width) != (1, stem):
      title += f" {groups}x{width}d"
    needed |= {
      "model.stride_in_3x3": (True,),
      "model.groups": (0, 1) if groups == 1 else (groups,),
      "model.group_width": mapping.width(width, usual=stem),
    }
  return Source(
    title,
    needed,
    shape_of(file, "fc.weight")[0],
    _torchvision_origin,
  )


def _cifar_resnet(file: files.WeightsFile) -> Source:
  blocks = _blocks(file.arrays)
  depth = 6 * blocks[0] + 2
  has_projections = any(".shortcut.0." in name for name in file.arrays)
  shortcut = "B" if has_projections else "A"
  return Source(
    f"a PyTorch CIFAR ResNet-{depth} with option {shortcut} shortcuts",
    {
      "model.name": ("resnet_v1",),
      "model.depth": (depth,),
      "model.num_filters": mapping.width(
        shape_of(file, "conv1.weight")[0], usual=16
      ),
      "model.shortcut": (shortcut,),
      **_RESNET,
      # Not the mean image: PyTorch's recipes normalise by channel.
      "normalization": ("imagenet", "channel", "none"),
    },
    shape_of(file, "linear.weight")[0],
    _cifar_origin,
  )


def _feedforward(file: files.WeightsFile) -> Source:
  has_norm = any(name.endswith(".running_mean") for name in file.arrays)
  is_alexnet = "classifier.1.weight" in file.arrays
  origin = _alexnet_origin if is_alexnet else _vgg_origin(has_norm)
  indexes = origin.args[0]
  convs = sum(1 for array in file.arrays.values() if array.ndim == 4)
  if convs != len(indexes):
    raise errors.WeightsError(
      f"{file.path} has {convs} convolutions and three dense layers, as neither"
      " torchvision's VGG-19 nor its AlexNet has."
    )
  title = "AlexNet" if is_alexnet else "VGG-19" + " with BN" * has_norm
  needed: dict[str, tuple[Any, ...]] = {
    "model.name": ("alexnet" if is_alexnet else "vgg",),
    "model.depth": (8 if is_alexnet else 19,),
    "model.conv_bias": (True,),
    "normalization": ("imagenet",),
  }
  if not is_alexnet:
    needed["model.norm"] = ("batch_norm" if has_norm else "none",)
  if has_norm:
    needed |= _EPSILON
  return Source(
    f"torchvision's {title}",
    needed,
    shape_of(file, "classifier.6.weight")[0],
    origin,
  )


def _resnet_origin(head: str, shortcut: str, path: Path) -> Origin:
  *block, layer, leaf = path[1:]
  if not block:
    stems = {"stem_conv": "conv1", "stem_bn": "bn1", "head": head}
    return _leaf(stems[layer], layer, leaf)
  stage, number = re.findall(r"\d+", block[0])
  parts = {"shortcut_conv": f"{shortcut}.0", "shortcut_bn": f"{shortcut}.1"}
  part = parts.get(layer, layer)
  return _leaf(f"layer{stage}.{int(number) - 1}.{part}", layer, leaf)


def _feedforward_origin(
  indexes: tuple[int, ...],
  dense: Mapping[str, int],
  channels: int,
  path: Path,
) -> Origin:
  layer, leaf = path[1:]
  if layer not in dense:
    kind, number = re.fullmatch(r"(conv|bn)(\d+)", layer).groups()  # type: ignore
    index = indexes[int(number) - 1] + (kind == "bn")
    return _leaf(f"features.{index}", layer, leaf)
  origin = _leaf(f"classifier.{dense[layer]}", layer, leaf)
  if (layer, leaf) == ("dense1", "kernel"):
    layouts = (
      functools.partial(f, channels) for f in (_flattened, _unflattened)
    )
    return Origin(origin.name, *layouts)
  return origin


def _vgg_origin(has_norm: bool) -> functools.partial[Origin]:
  indexes = _VGG19_BN if has_norm else _VGG19
  return functools.partial(_feedforward_origin, indexes, *_VGG_DENSE)


_torchvision_origin = functools.partial(_resnet_origin, "fc", "downsample")
_cifar_origin = functools.partial(_resnet_origin, "linear", "shortcut")
_alexnet_origin = functools.partial(
  _feedforward_origin, _ALEXNET, *_ALEXNET_DENSE
)

# The way out: by whose names and by `model.name`, what makes of `config.model`
# the `Source.origin` of the library's network.
ORIGINS: dict[tuple[str, str], Callable[[ConfigDict], mapping.OriginOf]] = {
  ("torchvision", "resnet_imagenet"): lambda model: _torchvision_origin,
  ("torchvision", "vgg"): lambda model: _vgg_origin(model.norm != "none"),
  ("torchvision", "alexnet"): lambda model: _alexnet_origin,
  ("cifar", "resnet_v1"): lambda model: _cifar_origin,
}


def _leaf(module: str, layer: str, leaf: str) -> Origin:
  """Where the kernel, bias, ... of one of our layers comes from."""
  if leaf == "kernel":
    layouts = _CONV if "conv" in layer else (np.transpose,)
    return Origin(f"{module}.weight", *layouts)
  if "bn" in layer:
    return Origin(f"{module}.{_NORM[leaf]}")
  return Origin(f"{module}.{leaf}")


def _flattened(channels: int, array: np.ndarray) -> np.ndarray:
  """[out, C*H*W] as [H*W*C, out]: what a dense layer after a flatten sees."""
  units, inputs = array.shape
  side = math.isqrt(inputs // channels)
  if channels * side * side != inputs:
    return np.transpose(array)
  array = array.reshape(units, channels, side, side)
  return np.transpose(array, (2, 3, 1, 0)).reshape(inputs, units)


def _unflattened(channels: int, array: np.ndarray) -> np.ndarray:
  """Undoes `_flattened`."""
  inputs, units = array.shape
  side = math.isqrt(inputs // channels)
  array = array.reshape(side, side, channels, units)
  return np.transpose(array, (3, 2, 0, 1)).reshape(units, inputs)
