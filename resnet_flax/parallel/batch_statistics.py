"""Measures batch norm's statistics of averaged weights on training images."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from resnet_flax import step as step_lib
from resnet_flax.data import randomness, types
from resnet_flax.parallel import averaging, program
from resnet_flax.parallel.networks import Layout, Networks

# Wu and Johnson 2021 (arXiv:2105.07576, section 3): 1,000 to 10,000 are enough.
_NUM_IMAGES = 5000


def create_hook(
  config: ConfigDict,
  experiment: step_lib.Experiment,
  state: Networks,
  split: types.Split,
  layout: Layout,
) -> Callable[[int, Networks], Networks]:
  """The loop's hook before a save: (steps done, state) -> state to save.

  With average_batch_norm='recompute' it replaces the running statistics of the
  average at the end of an epoch. `create_hook` uses only the shapes of `state`.
  """
  average = state.chunks[0].average or {}
  if config.average_batch_norm != "recompute" or not average.get("batch_stats"):
    return lambda step, state: state
  size = config.batch_size
  images = layout.batch_shape((size, *experiment.image_shape), np.uint8)
  measure = program.compile_function(
    "measurement of batch norm's statistics",
    functools.partial(batch_statistics, experiment),
    *(layout, [state, images], [np.int32(0)]),
  )

  def of_seed(seed: int, rows: np.ndarray) -> Iterator[tuple[np.ndarray]]:
    """The first images of epoch 0, without augmentation."""
    order = program.order(len(split), size, seed, epoch=0)
    positions = [*order[: max(_NUM_IMAGES // size, 1), rows]]
    for images, _ in split.one_crop().batches(positions):
      yield (images,)

  def hook(step: int, state: Networks) -> Networks:
    epochs, within = divmod(step, experiment.learning_rate.steps_per_epoch)
    if within or averaging.available(config, epochs) == ("raw",):
      return state
    batches = layout.batches(of_seed, size)
    of_batches = [
      layout.get(*measure(state, *images, np.int32(number)))
      for number, images in enumerate(batches)
    ]
    pooled = layout.put([*map(pool, zip(*of_batches, strict=True))])
    return layout.map(
      lambda old, new: old.replace(average=old.average | {"batch_stats": new}),
      *(state, pooled),
    )

  return hook


def batch_statistics(
  experiment: step_lib.Experiment,
  state: step_lib.TrainState,
  images: jax.Array,
  number: jax.Array,
) -> tuple[Any]:
  """The averaged network's 'batch_stats' of one batch, uint8[B, H, W, C].

  `number`, int32[], counts the batches: each drops other branches and units.
  """
  model: Any = experiment.model
  norm = functools.partial(model.norm, momentum=0.0)
  key = randomness.device_key(0, randomness.Purpose.AUGMENTATION)
  _, updated = model.clone(norm=norm).apply(
    state.average,
    state.normalization(images),
    train=True,
    mutable=["batch_stats"],
    rngs={"dropout": step_lib.step_keys(key, number)["dropout"]},
  )
  return (updated["batch_stats"],)


def pool(of_batches: Sequence[Any]) -> Any:
  """The float32 'mean' and 'var' over several equally large batches of images.

  The variances of `model.batch_norm_groups` are averaged, as in training.
  """
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *of_batches)
  flat = traverse_util.flatten_dict(stacked)
  pooled = {path: np.mean(x, 0, np.float64) for path, x in flat.items()}
  for *module, name in flat:
    if name == "var":
      pooled[*module, name] += np.var(flat[*module, "mean"], 0, np.float64)
  rounded = {path: x.astype(np.float32) for path, x in pooled.items()}
  return traverse_util.unflatten_dict(rounded)
