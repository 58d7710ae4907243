"""The training split on the devices, for several steps in one call.

On accelerators a small network's step may be over before the next one is
dispatched. A program of many steps needs the host only to begin it; it gathers
its batches from the split, in the order that the host draws for each epoch.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from resnet_flax import data as datasets
from resnet_flax.parallel import (
  hosts as distributed,
  mesh as mesh_lib,
  networks as seeds,
)
from resnet_flax.run import errors

# What is chosen for accelerators and images of at most so many pixels a side.
# Steps of larger ones take long enough, and a signal waits for a call's end.
STEPS_PER_CALL = 32
_LARGEST_SMALL_IMAGE = 64

# Of a device's memory that the split may take; the rest is the network's.
_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Resident:
  """A split on the devices.

  Attributes:
    images: uint8[M, H, W, C]; where M is larger than the split, the rest is
      padding that no position names.
    labels: int32[M].
  """

  images: jax.Array
  labels: jax.Array


def steps_per_call(
  wanted: int, split: datasets.Split, layout: seeds.Layout, image_size: int
) -> int:
  """How many training steps one program does.

  Args:
    wanted: `steps_per_call` of the configuration; 0 chooses.
    split: what is trained on.
    layout: where the networks are.
    image_size: the larger side of the images that the networks see.

  Raises:
    ConfigError: more than one was asked for, and the split is not in memory or
      the devices' memory has no room for it.
  """
  if wanted == 1:
    return 1
  if not isinstance(split, datasets.ArraySplit):
    if not wanted:
      return 1
    raise errors.ConfigError(
      f"steps_per_call={wanted} needs a training split in memory, but this one"
      " is decoded while training. Pass --config.steps_per_call=1."
    )
  on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
  if not wanted and (on_cpu or image_size > _LARGEST_SMALL_IMAGE):
    return 1
  if _fits(split, layout, _shards(layout)):
    return wanted or STEPS_PER_CALL
  if not wanted:
    return 1
  raise errors.ConfigError(
    f"steps_per_call={wanted} needs the {_num_bytes(split) / 1e9:.1f} GB of the"
    f" training split on the devices: over {_shards(layout)} that share it, it"
    f" is more than {_SHARE:.0%} of their memory. Pass"
    " --config.steps_per_call=1."
  )


def place(split: datasets.Split, layout: seeds.Layout) -> Resident:
  """Puts a split on the devices.

  A copy on each where it fits, since then no step needs another device's
  images; otherwise divided over the devices that share a batch.

  Args:
    split: what is trained on.
    layout: where the networks are.
  """
  images, labels = split.take(np.arange(len(split)))
  sharding = mesh_lib.replicated(layout.mesh)
  # Decided by one process for all.
  if not distributed.first(lambda: _fits(split, layout, 1)):
    sharding = mesh_lib.batch_sharding(layout.mesh)
    missing = -len(labels) % _shards(layout)
    images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
    labels = np.pad(labels, (0, missing))
  return Resident(*mesh_lib.put((images, labels), sharding))


def call_ends(
  first: int, last: int, steps: int, multiples: Sequence[int]
) -> Iterator[int]:
  """The number of steps done after each call.

  Args:
    first: steps done before the first call.
    last: steps done after the last one.
    steps: of a call, at most.
    multiples: calls end at every multiple of these; 0 stands for none.
  """
  done = first
  while done < last:
    ends = [(done // each + 1) * each for each in multiples if each]
    done = min(done + steps, last, *ends)
    yield done


def _shards(layout: seeds.Layout) -> int:
  return layout.mesh.shape[mesh_lib.DATA]


def _num_bytes(split: datasets.Split) -> int:
  return len(split) * math.prod(split.image_shape)


def _fits(split: datasets.Split, layout: seeds.Layout, shards: int) -> bool:
  """Whether a part of the split, one of so many, fits on every device."""
  # None on CPUs, whose memory is the host's: it holds the split already.
  limits = [
    (device.memory_stats() or {}).get("bytes_limit")
    for device in layout.mesh.local_devices
  ]
  needed = _num_bytes(split) / shards
  return all(limit is None or needed <= _SHARE * limit for limit in limits)
