"""Which networks there are, the depths they come in, and how to build one."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from resnet_flax import errors
from resnet_flax.models import batch_norm, layers, resnet

DTYPES = ("float32", "bfloat16")

_NUM_STAGES = 3


@dataclasses.dataclass(frozen=True)
class Family:
  """A network whose depth follows a rule.

  Attributes:
    layers_per_group: weighted layers that one more block in each of the three
      stages adds; depth = layers_per_group * n + 2.
    block_cls: the kind of block.
    stage_filters: maps the stem's filters to each stage's (inner, outer).
    final_norm_act: BN-ReLU before the pool.
    shortcuts: the shortcuts that the block can have.
  """

  layers_per_group: int
  block_cls: type[resnet.Block]
  stage_filters: Callable[[int], tuple[tuple[int, int], ...]]
  final_norm_act: bool
  shortcuts: tuple[str, ...]


def _basic_filters(stem: int) -> tuple[tuple[int, int], ...]:
  return tuple((stem * 2**k, stem * 2**k) for k in range(_NUM_STAGES))


def _bottleneck_filters(stem: int) -> tuple[tuple[int, int], ...]:
  outer = [stem * 4 * 2**k for k in range(_NUM_STAGES)]
  # A stage's inner width is the width that comes into the stage.
  return tuple(zip([stem, *outer[:-1]], outer, strict=True))


MODELS = {
  "resnet_v1": Family(
    6, resnet.BasicBlock, _basic_filters, False, ("keras", "A")
  ),
  "resnet_v2": Family(
    9, resnet.PreActBottleneckBlock, _bottleneck_filters, True, ("keras",)
  ),
}

SHORTCUTS = tuple(
  sorted({name for family in MODELS.values() for name in family.shortcuts})
)


def check_depth(name: str, depth: int) -> int:
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
  group = MODELS[name].layers_per_group
  blocks, rest = divmod(depth - 2, group)
  if rest == 0 and blocks >= 1:
    return blocks
  below = group * blocks + 2
  nearest = [d for d in (below, below + group) if d > 2] or [group + 2]
  raise errors.ConfigError(
    f"model.depth={depth} is not a depth of {name} ({group}n+2); nearest:"
    f" {' and '.join(map(str, nearest))}."
  )


def create_model(config: ConfigDict, num_classes: int) -> nn.Module:
  """Builds the network that `config.model` describes.

  Args:
    config: the `model` part of the configuration.
    num_classes: size of the head.

  Returns:
    A `resnet.ResNet`, called as `model.apply(variables, images, train=...)`
    with float[B, H, W, C] images, returning float32[B, num_classes] logits.

  Raises:
    ConfigError: an unknown name, an impossible depth, or a shortcut that the
      family does not have.
  """
  blocks = check_depth(config.name, config.depth)
  family = MODELS[config.name]
  if config.shortcut not in family.shortcuts:
    raise errors.ConfigError(
      f"model.shortcut={config.shortcut!r} does not exist for {config.name};"
      f" it has: {', '.join(family.shortcuts)}."
    )
  dtype = jnp.dtype(config.dtype)
  return resnet.ResNet(
    stage_sizes=(blocks,) * _NUM_STAGES,
    stage_filters=family.stage_filters(config.num_filters),
    stem_filters=config.num_filters,
    num_classes=num_classes,
    block_cls=family.block_cls,
    final_norm_act=family.final_norm_act,
    conv=functools.partial(
      layers.conv,
      padding=config.padding,
      use_bias=config.conv_bias,
      dtype=dtype,
    ),
    norm=functools.partial(
      batch_norm.BatchNorm,
      momentum=config.batch_norm_momentum,
      epsilon=config.batch_norm_epsilon,
      dtype=dtype,
    ),
    dense=functools.partial(
      nn.Dense, kernel_init=layers.he_normal, dtype=dtype
    ),
    shortcut=config.shortcut,
    remat=config.remat,
    scan=config.scan,
  )
