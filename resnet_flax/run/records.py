"""What a run writes down of an epoch, and of a step that failed."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from resnet_flax import step as step_lib
from resnet_flax.data import randomness, types
from resnet_flax.parallel import evaluate, networks, program
from resnet_flax.run import errors, metrics


def of_epoch(
  epoch: int,
  state: networks.Networks,
  notes: Mapping[str, Any],
  scores: Mapping[str, evaluate.Scores],
  layout: networks.Layout,
) -> metrics.Record:
  """The record of an epoch; a loss that is not finite is an error."""
  epoch_sums = layout.get(layout.map(lambda one: one.epoch_sums, state))
  of_seeds = []
  for k, seed in enumerate(layout.seeds):
    rate = notes["learning_rate"][k]
    count = float(epoch_sums[k]["count"])
    values = {"learning_rate": rate} | {
      f"train_{name}": float(total) / count
      for name, total in epoch_sums[k].items()
      # A metric that a restored checkpoint lacked is NaN for its epoch.
      if name != "count" and not math.isnan(total)
    }
    for split, score in scores.items():
      means = score.networks[k]
      if not math.isfinite(means["loss"]):
        raise errors.NonFiniteError(
          f"the {split} loss{layout.of_seed(seed)} is {means['loss']} after"
          f" step {state.step - 1} (0-based), at learning rate {rate:g}. Lower"
          " optimizer.learning_rate or model.batch_norm_momentum.",
          state.step - 1,
          seed,
        )
      values |= {f"{split}_{name}": mean for name, mean in means.items()}
    of_seeds.append(values)
  seconds = notes["epoch_seconds"]
  num_images = sum(int(sums["count"]) for sums in epoch_sums)
  ensembles = {
    f"{split}_ensemble_{name}": float(mean)
    for split, score in scores.items()
    for name, mean in (score.ensemble or {}).items()
  }
  first = {"epoch": epoch, "step": state.step}
  return metrics.summarize(first, layout.seeds, of_seeds, ensembles) | {
    "epoch_seconds": seconds,
    "data_seconds": notes["data_seconds"],
    "images_per_second": num_images / seconds,
  }


def reproduce(
  split: types.Split, batch_size: int, step: int, seed: int
) -> dict[str, Any]:
  """What leads to a step of a network, from the checkpoint before it."""
  epoch, within = divmod(step, len(split) // batch_size)
  positions = program.order(len(split), batch_size, seed, epoch)[within]
  key = randomness.device_key(seed, randomness.Purpose.AUGMENTATION)
  return {
    "seed": seed,
    "step": step,
    "epoch": epoch,
    "step_in_epoch": within,
    # Of the official training split, whatever part of it is used.
    "batch_indexes": split.indices[positions].tolist(),
    **{
      f"{name}_key": jax.random.key_data(key).tolist()
      for name, key in step_lib.step_keys(key, step).items()
    },
  }
