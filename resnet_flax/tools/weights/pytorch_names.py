"""PyTorch's names: torchvision's networks and the CIFAR ResNets.

Sources: the state dicts of torchvision's resnet.py, vgg.py and alexnet.py, and
of the widely used ResNets for CIFAR-10 in PyTorch. These name their blocks as
torchvision does, and call their head `linear`.
"""

import collections
import functools
import re
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from resnet_flax.models import other_blocks as others
from resnet_flax.run import errors
from resnet_flax.tools.weights import files, mapping
from resnet_flax.tools.weights.mapping import Origin, OriginOf, Path, Source

_NORM = {
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}

# (blocks of each stage, bottlenecks): depth. Depths 34 and 50 differ only in
# the kind of their blocks.
_IMAGENET_DEPTHS = {
  (sizes, depth >= others.FIRST_BOTTLENECK): depth
  for depth, sizes in others.IMAGENET_SIZES.items()
}


class _Features(NamedTuple):
  """The places of the layers in a network without blocks."""

  convs: tuple[int, ...]  # Indexes in `features`.
  dense: dict[str, int]  # Indexes in `classifier`.
  channels: int  # Channels of the first dense layer's input.


# VGG-19 without batch norm, and with it.
_VGG19 = tuple(
  _Features(convs, {"dense1": 0, "dense2": 3, "head": 6}, 512)
  for convs in (
    (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34),
    (0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49),
  )
)
_ALEXNET = _Features(
  (0, 3, 6, 8, 10), {"dense1": 1, "dense2": 4, "head": 6}, 256
)

# Values that all of PyTorch's ResNets need.
_RESNET = {
  "padding": "symmetric",
  "conv_bias": False,
  "batch_norm_epsilon": 1e-5,
}


def identify(file: files.WeightsFile) -> Source:
  """Finds the network of a file with PyTorch's names."""
  names = file.arrays.keys()
  if {"classifier.6.weight", "features.0.weight"} <= names:
    return _feedforward(file)
  if {"conv1.weight", "layer1.0.conv1.weight"} <= names:
    sizes = _blocks(file)
    if "fc.weight" in names:
      return _torchvision_resnet(file, sizes)
    if "linear.weight" in names and len(sizes) <= 3:
      return _cifar_resnet(file, sizes)
  raise mapping.unknown(
    file,
    "with PyTorch's names these are torchvision's ResNet-18 to 152, wide ones,"
    " ResNeXt, VGG-19 and AlexNet, and CIFAR ResNets with three stages and a"
    " head 'linear'",
  )


def _blocks(file: files.WeightsFile) -> tuple[int, ...]:
  """The number of blocks in layer1, layer2, and so on."""
  found = (re.match(r"(layer\d+)\.\d+\.", name) for name in file.arrays)
  blocks = {match[0]: match[1] for match in found if match}
  counts = collections.Counter(blocks.values())
  return tuple(counts[stage] for stage in sorted(counts))


def _torchvision_resnet(
  file: files.WeightsFile, sizes: tuple[int, ...]
) -> Source:
  has_bottlenecks = "layer1.0.conv3.weight" in file.arrays
  depth = _IMAGENET_DEPTHS.get((sizes, has_bottlenecks))
  if depth is None:
    raise errors.WeightsError(
      f"{file.path} is a ResNet with {sizes} blocks. It must be torchvision's"
      " ResNet-18, 34, 50, 101 or 152."
    )
  title, more = f"torchvision's ResNet-{depth}", dict[str, Any]()
  stem = file.shape("conv1.weight")[0]
  if has_bottlenecks:
    channels, width = file.shape("layer1.0.conv2.weight")[:2]
    groups = channels // max(width, 1)
    # Wide ResNets are named as torchvision names ResNeXts.
    if (groups, width) != (1, stem):
      title += f" {groups}x{width}d"
    more = {
      "stride_in_3x3": True,
      "groups": (0, 1) if groups == 1 else (groups,),
      "group_width": mapping.width(width, usual=stem),
    }
  return Source(
    title,
    file.shape("fc.weight")[0],
    _torchvision_origin,
    normalization=("imagenet",),
    name="resnet_imagenet",
    depth=depth,
    num_filters=mapping.width(stem, usual=64),
    shortcut=("B", "default"),
    **_RESNET,
    **more,
  )


def _cifar_resnet(file: files.WeightsFile, sizes: tuple[int, ...]) -> Source:
  depth = 6 * sizes[0] + 2
  has_projections = any(".shortcut.0." in name for name in file.arrays)
  shortcut = "B" if has_projections else "A"
  return Source(
    f"a PyTorch CIFAR ResNet-{depth} with option {shortcut} shortcuts",
    file.shape("linear.weight")[0],
    _cifar_origin,
    # No mean image, since PyTorch's recipes normalise by channel.
    normalization=("imagenet", "channel", "none"),
    name="resnet_v1",
    depth=depth,
    num_filters=mapping.width(file.shape("conv1.weight")[0], usual=16),
    shortcut=shortcut,
    **_RESNET,
  )


def _feedforward(file: files.WeightsFile) -> Source:
  has_norm = any(name.endswith(".running_mean") for name in file.arrays)
  is_alexnet = "classifier.1.weight" in file.arrays
  features = _ALEXNET if is_alexnet else _VGG19[has_norm]
  if file.num_convs != len(features.convs):
    raise errors.WeightsError(
      f"{file.path} has {file.num_convs} convolutions and three dense layers."
      " It must be torchvision's VGG-19 or AlexNet."
    )
  more: dict[str, Any] = {"batch_norm_epsilon": 1e-5} if has_norm else {}
  if is_alexnet:
    title, depth = "AlexNet", 8
  else:
    title, depth = "VGG-19" + " with BN" * has_norm, 19
    more["norm"] = "batch_norm" if has_norm else "none"
  return Source(
    f"torchvision's {title}",
    file.shape("classifier.6.weight")[0],
    functools.partial(_feedforward_origin, features),
    normalization=("imagenet",),
    name="alexnet" if is_alexnet else "vgg",
    depth=depth,
    conv_bias=True,
    **more,
  )


def origin_of(names: str, model: ConfigDict) -> OriginOf | None:
  """For export, maps our arrays to those of 'torchvision' or 'cifar'.

  None if the library has no such network.
  """
  match names, model.name:
    case "torchvision", "resnet_imagenet":
      return _torchvision_origin
    case "torchvision", "vgg":
      features = _VGG19[model.norm != "none"]
    case "torchvision", "alexnet":
      features = _ALEXNET
    case "cifar", "resnet_v1":
      return _cifar_origin
    case _:
      return None
  return functools.partial(_feedforward_origin, features)


def _resnet_origin(head: str, shortcut: str, path: Path) -> Origin:
  *block, layer, leaf = path[1:]
  parts = {"shortcut_conv": f"{shortcut}.0", "shortcut_bn": f"{shortcut}.1"}
  parts |= {"stem_conv": "conv1", "stem_bn": "bn1", "head": head}
  prefix = ""
  if block:
    stage, number = map(int, re.findall(r"\d+", block[0]))
    prefix = f"layer{stage}.{number - 1}."
  return _leaf(prefix + parts.get(layer, layer), layer, leaf)


_torchvision_origin = functools.partial(_resnet_origin, "fc", "downsample")
_cifar_origin = functools.partial(_resnet_origin, "linear", "shortcut")


def _feedforward_origin(features: _Features, path: Path) -> Origin:
  layer, leaf = path[1:]
  if layer in features.dense:
    origin = _leaf(f"classifier.{features.dense[layer]}", layer, leaf)
    if (layer, leaf) == ("dense1", "kernel"):
      convert = functools.partial(_flattened, features.channels)
      back = functools.partial(_unflattened, features.channels)
      return Origin(origin.name, convert, back)
    return origin
  number = int(layer.removeprefix("conv").removeprefix("bn"))
  # A batch norm comes directly after its convolution.
  index = features.convs[number - 1] + layer.startswith("bn")
  return _leaf(f"features.{index}", layer, leaf)


def _leaf(module: str, layer: str, leaf: str) -> Origin:
  """Where the kernel, bias, ... of one of our layers comes from."""
  if "bn" in layer:
    return Origin(f"{module}.{_NORM[leaf]}")
  if leaf == "bias":
    return Origin(f"{module}.bias")
  if "conv" not in layer:
    return Origin(f"{module}.weight", np.transpose, np.transpose)
  # From OIHW to HWIO, and back.
  return Origin(
    f"{module}.weight",
    functools.partial(np.transpose, axes=(2, 3, 1, 0)),
    functools.partial(np.transpose, axes=(3, 2, 0, 1)),
  )


def _flattened(channels: int, array: np.ndarray) -> np.ndarray:
  """Turns [out, C*H*W] into [H*W*C, out], for a dense layer after a flatten."""
  units = len(array)
  return array.reshape(units, channels, -1).T.reshape(-1, units)


def _unflattened(channels: int, array: np.ndarray) -> np.ndarray:
  """Undoes `_flattened`."""
  units = array.shape[1]
  return array.reshape(-1, channels, units).T.reshape(units, -1)
