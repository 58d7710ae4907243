"""Which networks there are, the depths they come in, and how to build one."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from resnet_flax.models import blocks, feedforward, layers, resnet, stems
from resnet_flax.models.kernels import batch_norm
from resnet_flax.run import errors

DTYPES = ("float32", "bfloat16")

# Sides of the images that stems are made for.
_SMALL_IMAGES = (1, 128)
_LARGE_IMAGES = (64, 2048)


@dataclasses.dataclass(frozen=True)
class Grouped:
  """Depths that follow a rule: three stages of as many blocks each.

  Attributes:
    layers_per_group: weighted layers that one more block in each of the three
      stages adds; depth = layers_per_group * n + 2.
  """

  layers_per_group: int

  def stage_sizes(self, depth: int) -> tuple[int, ...] | None:
    """The blocks of each stage, or None if the depth is not one."""
    n, rest = divmod(depth - 2, self.layers_per_group)
    return (n,) * 3 if rest == 0 and n >= 1 else None

  def nearest(self, depth: int) -> list[int]:
    """The depths on both sides of one that is not."""
    below = (depth - 2) // self.layers_per_group * self.layers_per_group + 2
    both = [d for d in (below, below + self.layers_per_group) if d > 2]
    return both or [self.layers_per_group + 2]

  def __str__(self) -> str:
    return f"{self.layers_per_group}n+2"


@dataclasses.dataclass(frozen=True)
class Listed:
  """Depths that a paper lists.

  Attributes:
    sizes: for each depth the blocks of each stage; none where there are no
      blocks.
  """

  sizes: Mapping[int, tuple[int, ...]]

  def stage_sizes(self, depth: int) -> tuple[int, ...] | None:
    """The blocks of each stage, or None if the depth is not one."""
    return self.sizes.get(depth)

  def nearest(self, depth: int) -> list[int]:
    """The depths on both sides of one that is not."""
    below = [d for d in self.sizes if d < depth]
    above = [d for d in self.sizes if d > depth]
    return below[-1:] + above[:1]

  def __str__(self) -> str:
    return ", ".join(map(str, self.sizes))


@dataclasses.dataclass(frozen=True)
class Family:
  """Networks that differ in depth.

  Attributes:
    depths: which depths there are.
    build: makes a network from the `model` part of a configuration, the
      stages' sizes and the arguments that all networks share.
    shortcuts: the shortcuts that there are, the usual one first.
    num_filters: the usual channels of the stem; 0 if it has no such choice.
    own_keys: which of `OWN_KEYS` it reads.
    input_sizes: the smallest and the largest side of an image.
  """

  depths: Grouped | Listed
  build: Callable[..., nn.Module]
  shortcuts: tuple[str, ...]
  num_filters: int
  own_keys: tuple[str, ...]
  input_sizes: tuple[int, int]


def _norm(config: ConfigDict, *, has_batch_norm: bool) -> Any:
  """What makes a network's normalisation layers."""
  dtype = jnp.dtype(config.dtype)
  if not has_batch_norm:
    if config.batch_norm_groups != 1:
      raise errors.ConfigError(
        f"model.batch_norm_groups={config.batch_norm_groups} does nothing"
        " without batch norm. Leave it 1."
      )
    return functools.partial(batch_norm.NoNorm, dtype=dtype)
  return functools.partial(
    batch_norm.BatchNorm,
    momentum=config.batch_norm_momentum,
    epsilon=config.batch_norm_epsilon,
    groups=config.batch_norm_groups,
    dtype=dtype,
  )


def _basic(stem: int, stages: int) -> tuple[tuple[int, int], ...]:
  """(inner, outer) channels of each stage of basic blocks."""
  return tuple((stem * 2**k, stem * 2**k) for k in range(stages))


def _bottleneck(stem: int, stages: int) -> tuple[tuple[int, int], ...]:
  """(inner, outer) channels of each stage of bottlenecks (He et al. 2015)."""
  return tuple((stem * 2**k, 4 * stem * 2**k) for k in range(stages))


def _keras_bottleneck(stem: int, stages: int) -> tuple[tuple[int, int], ...]:
  """(inner, outer) channels of the Keras example's v2.

  A stage's inner width is the width that comes into the stage.
  """
  outer = [stem * 4 * 2**k for k in range(stages)]
  return tuple(zip([stem, *outer[:-1]], outer, strict=True))


def _resnet(
  config: ConfigDict,
  stage_sizes: tuple[int, ...],
  *,
  stem: stems.Stem,
  block_cls: Callable[..., blocks.Block],
  filters: Callable[[int, int], tuple[tuple[int, int], ...]],
  final_norm_act: bool = False,
  **shared: Any,
) -> nn.Module:
  return resnet.ResNet(
    stage_sizes=stage_sizes,
    stage_filters=filters(num_filters(config), len(stage_sizes)),
    stem=stem,
    stem_filters=num_filters(config),
    block_cls=block_cls,
    final_norm_act=final_norm_act,
    remat=config.remat,
    scan=config.scan,
    **shared,
  )


_small_resnet = functools.partial(
  _resnet, stem=stems.small_images, filters=_basic
)


def _large_resnet(
  config: ConfigDict, *args: Any, **arguments: Any
) -> nn.Module:
  stem = functools.partial(stems.large_images, padding=config.padding)
  return _resnet(config, *args, stem=stem, **arguments)


def _highway(config: ConfigDict, *args: Any, **shared: Any) -> nn.Module:
  block_cls = functools.partial(blocks.HighwayBlock, gate_bias=config.gate_bias)
  return _small_resnet(config, *args, block_cls=block_cls, **shared)


def _resnet_imagenet(
  config: ConfigDict, *args: Any, **shared: Any
) -> nn.Module:
  if config.depth < FIRST_BOTTLENECK:
    return _large_resnet(
      config, *args, block_cls=blocks.BasicBlock, filters=_basic, **shared
    )
  block_cls = functools.partial(
    blocks.BottleneckBlock, stride_in_3x3=config.stride_in_3x3
  )
  return _large_resnet(
    config, *args, block_cls=block_cls, filters=_bottleneck, **shared
  )


def _feedforward(
  config: ConfigDict,
  stage_sizes: tuple[int, ...],
  *,
  shortcut: str,
  **arguments: Any,
) -> nn.Module:
  del stage_sizes, shortcut  # There are neither stages nor shortcuts.
  for key in ("remat", "scan"):
    if config[key]:
      raise errors.ConfigError(
        f"model.{key}=True needs a network of blocks, which"
        f" model.name={config.name} is not; set it to False."
      )
  return feedforward.FeedForward(
    hidden_sizes=(4096, 4096),
    dropout=config.dropout,
    **arguments,
  )


def _vgg(config: ConfigDict, *args: Any, **shared: Any) -> nn.Module:
  return _feedforward(
    config,
    *args,
    features=feedforward.VGG19,
    pooled_size=7,
    dropped=(False, True, True),
    **shared,
  )


def _alexnet(config: ConfigDict, *args: Any, **shared: Any) -> nn.Module:
  # It is from before batch norm.
  shared["norm"] = _norm(config, has_batch_norm=False)
  return _feedforward(
    config,
    *args,
    features=feedforward.ALEXNET,
    pooled_size=6,
    dropped=(True, True, False),
    **shared,
  )


# He et al. 2015, table 1: for each depth the blocks of each stage, which are
# bottlenecks from 50 layers on.
FIRST_BOTTLENECK = 50
IMAGENET_SIZES: Mapping[int, tuple[int, ...]] = {
  18: (2, 2, 2, 2),
  34: (3, 4, 6, 3),
  50: (3, 4, 6, 3),
  101: (3, 4, 23, 3),
  152: (3, 8, 36, 3),
}

MODELS = {
  "resnet_v1": Family(
    Grouped(6),
    functools.partial(_small_resnet, block_cls=blocks.BasicBlock),
    blocks.SHORTCUTS,
    16,
    ("num_filters", "norm"),
    _SMALL_IMAGES,
  ),
  "resnet_v2": Family(
    Grouped(9),
    functools.partial(
      _small_resnet,
      block_cls=blocks.PreActBottleneckBlock,
      filters=_keras_bottleneck,
      final_norm_act=True,
    ),
    ("keras",),
    16,
    ("num_filters", "norm"),
    _SMALL_IMAGES,
  ),
  "plain": Family(
    Grouped(6),
    functools.partial(_small_resnet, block_cls=blocks.BasicBlock),
    ("none",),
    16,
    ("num_filters", "norm"),
    _SMALL_IMAGES,
  ),
  "preact": Family(
    Grouped(6),
    functools.partial(
      _small_resnet, block_cls=blocks.PreActBlock, final_norm_act=True
    ),
    ("A", "keras"),
    16,
    ("num_filters", "norm"),
    _SMALL_IMAGES,
  ),
  "highway": Family(
    Grouped(6),
    _highway,
    ("A", "keras", "B"),
    16,
    ("num_filters", "norm", "gate_bias"),
    _SMALL_IMAGES,
  ),
  "resnet_imagenet": Family(
    Listed(IMAGENET_SIZES),
    _resnet_imagenet,
    ("B", "A", "C"),
    64,
    ("num_filters", "stride_in_3x3"),
    _LARGE_IMAGES,
  ),
  "plain_imagenet": Family(
    Listed({depth: IMAGENET_SIZES[depth] for depth in (18, 34)}),
    functools.partial(
      _large_resnet, block_cls=blocks.BasicBlock, filters=_basic
    ),
    ("none",),
    64,
    ("num_filters",),
    _LARGE_IMAGES,
  ),
  "vgg": Family(
    Listed({19: ()}),
    _vgg,
    ("none",),
    0,
    ("norm", "dropout"),
    _LARGE_IMAGES,
  ),
  "alexnet": Family(
    Listed({8: ()}), _alexnet, ("none",), 0, ("dropout",), _LARGE_IMAGES
  ),
}

# Keys of `model` that only some families read, with the values that say nothing
# to the others: those of `configs/base.py`.
OWN_KEYS = {
  "num_filters": 0,
  "stride_in_3x3": True,
  "gate_bias": -2.0,
  "norm": "batch_norm",
  "dropout": 0.5,
}

# What `model.shortcut` can be: a family's first, or one by its name.
SHORTCUTS = ("default", *blocks.SHORTCUTS, "none")


def check_depth(name: str, depth: int) -> tuple[int, ...]:
  """The number of blocks in each stage of a network of this depth.

  Args:
    name: a key of `MODELS`.
    depth: weighted layers from the stem to the head, shortcuts not counted.

  Raises:
    ConfigError: no network of that family has this depth; the message names
      the nearest that do.
  """
  if name not in MODELS:
    raise errors.unknown_name("model.name", name, MODELS)
  depths = MODELS[name].depths
  stage_sizes = depths.stage_sizes(depth)
  if stage_sizes is None:
    nearest = " and ".join(map(str, depths.nearest(depth)))
    raise errors.ConfigError(
      f"model.depth={depth} is not a depth of {name} ({depths}); nearest:"
      f" {nearest}."
    )
  return stage_sizes


def shortcut(config: ConfigDict) -> str:
  """The shortcut of the network that `config.model` describes."""
  if config.shortcut == "default":
    return MODELS[config.name].shortcuts[0]
  return config.shortcut


def num_filters(config: ConfigDict) -> int:
  """The stem's channels in the network that `config.model` describes."""
  return config.num_filters or MODELS[config.name].num_filters


def check_input_size(config: ConfigDict, image_shape: tuple[int, ...]) -> None:
  """Refuses images that the network's stem is not made for.

  Args:
    config: the `model` part of the configuration.
    image_shape: (H, W, C) of the data set's images.

  Raises:
    ConfigError: they are too small or too large, as `model.input_size` leaves
      them.
  """
  height, width = image_shape[:2]
  if config.input_size:
    height = width = config.input_size
  try:
    layers.check_input_size(height, width, MODELS[config.name].input_sizes)
  except errors.ConfigError as error:
    raise errors.ConfigError(
      f"model.name={config.name}, model.input_size={config.input_size}: {error}"
    ) from None


def create_model(config: ConfigDict, num_classes: int) -> nn.Module:
  """Builds the network that `config.model` describes.

  Args:
    config: the `model` part of the configuration.
    num_classes: size of the head.

  Returns:
    A `resnet.ResNet` or `feedforward.FeedForward`, called as
    `model.apply(variables, images, train=...)` with float[B, H, W, C] images,
    returning float32[B, num_classes] logits.

  Raises:
    ConfigError: an unknown name, an impossible depth, or a shortcut, switch or
      key that the family does not have.
  """
  stage_sizes = check_depth(config.name, config.depth)
  family = MODELS[config.name]
  if shortcut(config) not in family.shortcuts:
    raise errors.ConfigError(
      f"model.shortcut={config.shortcut!r} does not exist for {config.name};"
      f" it has: {', '.join(family.shortcuts)}."
    )
  for key, neutral in OWN_KEYS.items():
    if key not in family.own_keys and config[key] != neutral:
      readers = [name for name, f in MODELS.items() if key in f.own_keys]
      raise errors.ConfigError(
        f"model.{key}={config[key]} does nothing for model.name={config.name};"
        f" it is for {', '.join(readers)}. Leave it {neutral}."
      )
  dtype = jnp.dtype(config.dtype)
  return family.build(
    config,
    stage_sizes,
    num_classes=num_classes,
    conv=functools.partial(
      layers.conv,
      padding=config.padding,
      use_bias=config.conv_bias,
      dtype=dtype,
    ),
    norm=_norm(config, has_batch_norm=config.norm == "batch_norm"),
    dense=functools.partial(
      nn.Dense, kernel_init=layers.he_normal, dtype=dtype
    ),
    shortcut=shortcut(config),
    input_size=config.input_size,
    input_sizes=family.input_sizes,
  )
