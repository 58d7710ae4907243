"""PyTorch's names: torchvision's networks and the CIFAR ResNets.

Sources: the state dicts of torchvision's resnet.py, vgg.py and alexnet.py, and
of the widely used CIFAR-10 ResNets in PyTorch. The CIFAR ResNets name blocks as
torchvision does, and call their head `linear`.
"""

import functools
import re
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from resnet_flax.models import feedforward, other_blocks as others
from resnet_flax.run import errors
from resnet_flax.tools.weights import files, mapping
from resnet_flax.tools.weights.mapping import Origin, OriginOf, Path, Source

_NORM = {
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}

# Indexes of the dense layers in torchvision's `classifier`.
_DENSE = {"vgg": (0, 3, 6), "alexnet": (1, 4, 6)}

# Values of `config.model` that all of PyTorch's ResNets need.
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
    pattern = re.compile(r"(layer\d+)\.\d+\.conv1\.weight")
    stages = [match[1] for match in map(pattern.fullmatch, names) if match]
    sizes = tuple(stages.count(stage) for stage in sorted(set(stages)))
    if "fc.weight" in names:
      return _torchvision_resnet(file, sizes)
    if "linear.weight" in names and len(sizes) <= 3:
      return _cifar_resnet(file, sizes)
  raise mapping.unknown_network(
    file,
    "with PyTorch's names these are torchvision's ResNet-18 to 152, wide ones,"
    " ResNeXt, VGG-19 and AlexNet, and CIFAR ResNets with three stages and a"
    " head 'linear'",
  )


def _torchvision_resnet(
  file: files.WeightsFile, sizes: tuple[int, ...]
) -> Source:
  has_bottlenecks = "layer1.0.conv3.weight" in file.arrays
  # Depths 34 and 50 differ only in the kind of their blocks.
  depths = [
    depth
    for depth, blocks in others.IMAGENET_SIZES.items()
    if blocks == sizes and (depth >= others.FIRST_BOTTLENECK) == has_bottlenecks
  ]
  if not depths:
    raise errors.WeightsError(
      f"{file.path} is a ResNet with {sizes} blocks. It must be torchvision's"
      " ResNet-18, 34, 50, 101 or 152."
    )
  title, more = f"torchvision's ResNet-{depths[0]}", dict[str, Any]()
  stem = file.shape("conv1.weight")[0]
  if has_bottlenecks:
    channels, width = file.shape("layer1.0.conv2.weight")[:2]
    groups = channels // max(width, 1)
    # ResNeXts and wide ResNets have these numbers in their titles.
    if (groups, width) != (1, stem):
      title += f" {groups}x{width}d"
    more = {
      "stride_in_3x3": True,
      "groups": (0, 1) if groups == 1 else (groups,),
      "group_width": mapping.allowed_widths(width, usual=stem),
    }
  return Source(
    title,
    file.shape("fc.weight")[0],
    _torchvision_origin,
    normalization=("imagenet",),
    name="resnet_imagenet",
    depth=depths[0],
    num_filters=mapping.allowed_widths(stem, usual=64),
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
    num_filters=mapping.allowed_widths(file.shape("conv1.weight")[0], usual=16),
    shortcut=shortcut,
    **_RESNET,
  )


def _feedforward(file: files.WeightsFile) -> Source:
  has_norm = any(name.endswith(".running_mean") for name in file.arrays)
  title, name, depth, more = "VGG-19", "vgg", 19, dict[str, Any](norm="none")
  if "classifier.1.weight" in file.arrays:
    title, name, depth, more = "AlexNet", "alexnet", 8, {}
  elif has_norm:
    title, more = "VGG-19 with BN", {"batch_norm_epsilon": 1e-5}
  features = feedforward.NETWORKS[name]["features"]
  if file.num_convs != sum(isinstance(x, feedforward.Conv) for x in features):
    raise errors.WeightsError(
      f"{file.path} has {file.num_convs} convolutions and three dense layers."
      " It must be torchvision's VGG-19 or AlexNet."
    )
  return Source(
    f"torchvision's {title}",
    file.shape("classifier.6.weight")[0],
    functools.partial(_feedforward_origin, name, has_norm),
    normalization=("imagenet",),
    name=name,
    depth=depth,
    conv_bias=True,
    **more,
  )


def origin_of(names: str, model: ConfigDict) -> OriginOf | None:
  """For export, maps our arrays to arrays of 'torchvision' or 'cifar'.

  None if that library has no network like `model`.
  """
  match names, model.name:
    case "torchvision", "resnet_imagenet":
      return _torchvision_origin
    case "torchvision", "vgg":
      return functools.partial(_feedforward_origin, "vgg", model.norm != "none")
    case "torchvision", "alexnet":
      return functools.partial(_feedforward_origin, "alexnet", False)
    case "cifar", "resnet_v1":
      return _cifar_origin
  return None


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


def _feedforward_origin(name: str, has_norm: bool, path: Path) -> Origin:
  dense = zip(("dense1", "dense2", "head"), _DENSE[name], strict=True)
  modules = {layer: f"classifier.{index}" for layer, index in dense}
  network = feedforward.NETWORKS[name]
  index = number = 0
  for feature in network["features"]:
    if isinstance(feature, feedforward.Conv):
      number += 1
      modules[f"conv{number}"] = f"features.{index}"
      modules[f"bn{number}"] = f"features.{index + 1}"
      index += 1 + has_norm  # A ReLU follows the convolution and its norm.
    index += 1
  layer, leaf = path[1:]
  side = network["pooled_size"] if layer == "dense1" else 0
  return _leaf(modules[layer], layer, leaf, side)


def _leaf(module: str, layer: str, leaf: str, side: int = 0) -> Origin:
  """The origin of a leaf, such as the kernel, of one of our layers."""
  if "bn" in layer or leaf == "bias":
    return Origin(f"{module}.{_NORM[leaf]}")
  return Origin(f"{module}.weight", functools.partial(_view, side))


def _view(side: int, kernel: np.ndarray) -> np.ndarray:
  """Views HWIO as OIHW, and IO of dense layers as OI."""
  if side:  # The dense layer follows a flatten of side x side pixels.
    kernel = kernel.reshape(side, side, -1, kernel.shape[-1])
  return np.moveaxis(kernel, (-1, -2), (0, 1))
