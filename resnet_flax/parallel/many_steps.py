"""Several training steps in one call, on a training split on the devices.

On accelerators a small network's step may end before the host has dispatched
the next one. So each call does many steps. It gathers their batches from the
split, in the order that the host draws for each epoch.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from resnet_flax import step as step_lib
from resnet_flax.data import types
from resnet_flax.parallel import mesh as mesh_lib, program, transfer
from resnet_flax.parallel.networks import Layout, Networks
from resnet_flax.run import errors

# The default on accelerators.
STEPS_PER_CALL = 32
# Pixels of the longer side up to which this default holds. With larger images
# the host keeps up, and a signal would wait for a long call.
_LARGEST_SMALL_IMAGE = 64

# Share of a device's memory that the split may take beside the network.
_SHARE = 0.25


def choose(
  wanted: int, split: types.Split, layout: Layout, image_size: int
) -> int:
  """The number of training steps in a call: `wanted`, or a default if it is 0.

  `image_size` is the larger side of the images that the networks see. Raises
  `ConfigError` if several are wanted, but the split is streamed or too large.
  """
  on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
  steps_are_slow = on_cpu or image_size > _LARGEST_SMALL_IMAGE
  if wanted == 1 or (not wanted and steps_are_slow):
    return 1
  lacking = "a training split in memory, but this one is decoded while training"
  if isinstance(split, types.ArraySplit):
    size = len(split) * math.prod(split.image_shape)
    # CPUs, which hold the split in memory already, report no limit.
    limits = [
      (device.memory_stats() or {}).get("bytes_limit", math.inf)
      for device in layout.mesh.local_devices
    ]
    if size <= _SHARE * min(limits):
      return wanted or STEPS_PER_CALL
    lacking = (
      f"the {size / 1e9:.1f} GB of the training split on every device: that is"
      f" more than {_SHARE:.0%} of a device's memory"
    )
  if not wanted:
    return 1
  raise errors.ConfigError(
    f"steps_per_call={wanted} needs {lacking}. Pass --config.steps_per_call=1."
  )


def create(
  config: ConfigDict,
  experiment: step_lib.Experiment,
  state: Networks,
  split: types.Split,
  key: Networks,
  layout: Layout,
  *,
  steps_per_call: int,
) -> program.Program:
  """The program with `steps_per_call` steps in a call; see `program.create`."""
  if steps_per_call == 1:
    return program.create(config, experiment, state, split, key, layout)
  size = config.batch_size
  steps_per_epoch = experiment.learning_rate.steps_per_epoch
  # A copy on each device, so that no step needs another device's images.
  everywhere = mesh_lib.sharding(layout.mesh)
  data = transfer.put(split.take(np.arange(len(split))), everywhere)
  compiled = program.compile_function(
    "training steps",
    functools.partial(train_steps, experiment),
    layout,
    (state, layout.batch_shape((size, steps_per_epoch), np.int32), key),
    (*data, np.int32(0)),
    donate=True,
  )
  # A call ends where the loop saves or measures between two steps.
  multiples = config.checkpoint.every_steps, config.log_layer_norms_every

  def batches(epoch: int, first: int) -> Iterator[program.Batch]:
    order = _put_order(split, size, epoch, layout)
    start = epoch * steps_per_epoch
    done = start + first
    for end in call_ends(
      done, start + steps_per_epoch, steps_per_call, multiples
    ):

      def images_and_labels(first=done - start):
        return next(program.epoch_batches(split, size, epoch, layout, first))

      arguments = order, key, *data, np.int32(end - done)
      yield program.Batch(end - done, arguments, images_and_labels)
      done = end

  return program.Program(compiled, batches)


def train_steps(
  experiment: step_lib.Experiment,
  state: step_lib.TrainState,
  order: jax.Array,
  key: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  num_steps: jax.Array,
) -> tuple[step_lib.TrainState, step_lib.StepMetrics]:
  """Several steps of one epoch, each done by `step.train_step`.

  `num_steps`, int32[], is an argument of the program, so that results are
  bit-identical wherever calls end. `images`, uint8[M, H, W, C], and `labels`,
  int32[M], are the split; `order`, int32[B, steps per epoch], has the positions
  of each batch in it. Every step takes the same `key`, key[]. Returns the new
  state, and the metrics of the last step or of the first that is not finite.
  """
  steps_per_epoch = experiment.learning_rate.steps_per_epoch

  def one(_, carry):
    state, reported = carry
    positions = jnp.take(order, state.step % steps_per_epoch, axis=1)
    state, new = step_lib.train_step(
      experiment, state, images[positions], labels[positions], key
    )
    reported = jax.tree.map(
      lambda old, new: jnp.where(reported.finite, new, old), reported, new
    )
    return state, reported

  initial = step_lib.StepMetrics(
    step=state.step,
    sums=state.epoch_sums,
    learning_rate=jnp.zeros((), jnp.float32),
    finite=jnp.asarray(True),
  )
  return jax.lax.fori_loop(0, num_steps, one, (state, initial))


def _put_order(
  split: types.Split, batch_size: int, epoch: int, layout: Layout
) -> Networks:
  """Puts an epoch's order on devices: int32[B, steps per epoch] per network."""

  def of_seed(seed: int, rows: np.ndarray) -> list[tuple[np.ndarray]]:
    # Transposed: devices get the order like a batch, whose axis comes first.
    order = program.order(len(split), batch_size, seed, epoch).T[rows]
    return [(np.ascontiguousarray(order, np.int32),)]

  ((order,),) = layout.batches(of_seed, batch_size)
  return order


def call_ends(
  first: int, last: int, steps: int, multiples: Sequence[int]
) -> Iterator[int]:
  """The number of steps done after each call, from `first` to `last`.

  A call does at most `steps` steps. It ends at every multiple of each number in
  `multiples`; 0 has no multiples.
  """
  while first < last:
    ends = [(first // each + 1) * each for each in multiples if each]
    first = min(first + steps, last, *ends)
    yield first
