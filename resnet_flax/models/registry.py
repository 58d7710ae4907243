"""The networks by name, their depths, and how to build one."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from resnet_flax.models import (
  blocks,
  branches,
  feedforward,
  group_norm,
  layers,
  other_blocks as others,
  resnet,
  stems,
)
from resnet_flax.models.kernels import batch_norm, convolution
from resnet_flax.run import errors

# ---- Families


@dataclasses.dataclass(frozen=True)
class Family:
  """A family of networks: its depths, shortcuts, blocks and stem."""

  # An integer L: three stages of n blocks make L * n + `besides` weighted
  # layers. Or, for each depth that a paper lists, the blocks of each stage.
  depths: int | Mapping[int, tuple[int, ...]]
  shortcuts: tuple[str, ...]  # Values of `model.shortcut`, the default first.
  # Maps the configuration and the stem's channels to the block and its widths.
  # None: the network is in `feedforward.NETWORKS`.
  block_and_widths: Callable[..., blocks.BlockAndWidths] | None = None
  num_filters: int = 0  # The usual channels of the stem.
  large_images: bool = False  # Decides the stem and the allowed image sizes.
  final_norm_act: bool = False
  besides: int = 2


_PREACT = {"final_norm_act": True}

MODELS = {
  "resnet_v1": Family(6, blocks.SHORTCUTS, blocks.basic, 16),
  "resnet_v2": Family(9, ("keras",), others.keras_bottleneck, 16, **_PREACT),
  "plain": Family(6, ("none",), blocks.basic, 16),
  "preact": Family(6, ("A", "keras"), others.preact, 16, **_PREACT),
  # wide_resnet's depth also counts three shortcuts, but not the head.
  "wide_resnet": Family(6, ("keras",), others.preact, 16, besides=4, **_PREACT),
  "resnext": Family(9, ("B",), others.bottleneck, 64),
  "highway": Family(6, ("A", "keras", "B"), others.highway, 16),
  "resnet_imagenet": Family(
    *(others.IMAGENET_SIZES, ("B", "A", "C"), others.imagenet, 64),
    large_images=True,
  ),
  "plain_imagenet": Family(
    {d: others.IMAGENET_SIZES[d] for d in (18, 34)},
    *(("none",), blocks.basic, 64),
    large_images=True,
  ),
  "vgg": Family({19: ()}, ("none",), large_images=True),
  "alexnet": Family({8: ()}, ("none",), large_images=True),
}


def check_depth(name: str, depth: int) -> tuple[int, ...]:
  """The number of blocks in each stage of a network of this depth.

  Depth counts weighted layers except shortcuts. wide_resnet's depth counts all
  convolutions, but not the head.

  Raises:
    ConfigError: the name is unknown, or its family has no network of this
      depth. The message then names the nearest depths.
  """
  if name not in MODELS:
    raise errors.unknown_name("model.name", name, MODELS)
  depths, besides = MODELS[name].depths, MODELS[name].besides
  if isinstance(depths, int):
    n, rest = divmod(depth - besides, depths)
    if rest == 0 and n >= 1:
      return (n,) * 3
    candidates = [depths * max(k, 1) + besides for k in (n, n + 1)]
    allowed = f"{depths}n+{besides} with n > 0"
  else:
    if depth in depths:
      return depths[depth]
    below = [d for d in depths if d < depth]
    above = [d for d in depths if d > depth]
    candidates = below[-1:] + above[:1]
    allowed = " or ".join(map(str, depths))
  nearest = " and ".join(map(str, sorted(set(candidates))))
  raise errors.ConfigError(
    f"model.depth={depth} must be {allowed} for model.name={name}; nearest:"
    f" {nearest}."
  )


def shortcut(config: ConfigDict) -> str:
  """The shortcut of the network that `config.model` describes."""
  if config.shortcut == "default":
    return MODELS[config.name].shortcuts[0]
  return config.shortcut


def num_filters(config: ConfigDict) -> int:
  """The stem's channels in the network that `config.model` describes."""
  return config.num_filters or MODELS[config.name].num_filters


# ---- Construction


# The normalisations, by `model.norm`: each maps the configuration to a function
# of `use_running_average`, `dtype`, `act` and `name` that makes a layer. The
# layer is called with x, or with x and a residual.
NORMS: Mapping[str, Callable[[ConfigDict], Callable[..., nn.Module]]] = {
  "batch_norm": lambda config: functools.partial(
    batch_norm.BatchNorm,
    momentum=config.batch_norm_momentum,
    epsilon=config.batch_norm_epsilon,
    groups=config.batch_norm_groups,
  ),
  "group_norm": lambda config: group_norm.GroupNorm,
  "none": lambda config: batch_norm.NoNorm,
}


def create_model(config: ConfigDict, num_classes: int) -> nn.Module:
  """Builds the network that `config.model` describes.

  Returns:
    A `resnet.ResNet` or `feedforward.FeedForward`, called as
    `model.apply(variables, images, train=...)` with float[B, H, W, C] images,
    returning float32[B, num_classes] logits.

  Raises:
    ConfigError: the depth is impossible. `run/rules.py` checks other keys.
  """
  stage_sizes = check_depth(config.name, config.depth)
  family = MODELS[config.name]
  dtype = jnp.dtype(config.dtype)
  norm = "none" if config.name == "alexnet" else config.norm
  shared = {
    "num_classes": num_classes,
    "conv": functools.partial(
      layers.conv,
      padding=config.padding,
      use_bias=config.conv_bias,
      dtype=dtype,
      standardized=config.weight_standardization,
      conv_general_dilated=convolution.conv_general_dilated,
    ),
    "norm": functools.partial(NORMS[norm](config), dtype=dtype),
    "dense": functools.partial(
      nn.Dense, kernel_init=layers.he_normal, dtype=dtype
    ),
    "input_size": config.input_size,
  }
  if family.block_and_widths is None:
    return feedforward.FeedForward(
      dropout=config.dropout,
      **feedforward.NETWORKS[config.name],
      **shared,
    )
  block_cls, widths = family.block_and_widths(config, num_filters(config))
  if config.squeeze_excitation or config.stochastic_depth:
    branch = functools.partial(
      branches.Branch,
      *(config.squeeze_excitation, config.stochastic_depth, shared["dense"]),
    )
    block_cls = functools.partial(block_cls, branch=branch)
  stem = stems.small_images
  if family.large_images:
    stem = functools.partial(stems.large_images, padding=config.padding)
  return resnet.ResNet(
    stage_sizes=stage_sizes,
    stage_filters=tuple(map(widths, range(len(stage_sizes)))),
    stem=stem,
    stem_filters=num_filters(config),
    block_cls=block_cls,
    final_norm_act=family.final_norm_act,
    shortcut=shortcut(config),
    remat=config.remat,
    scan=config.scan,
    **shared,
  )
