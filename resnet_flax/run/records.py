"""Makes the record of an epoch, which a run adds to metrics.jsonl."""

import math
from collections.abc import Mapping
from typing import Any

from resnet_flax.parallel import evaluate, networks
from resnet_flax.run import errors, metrics


def of_epoch(
  epoch: int,
  state: networks.Networks,
  notes: Mapping[str, Any],
  scores: Mapping[str, evaluate.Scores],
  layout: networks.Layout,
) -> metrics.Record:
  """An epoch's record; `NonFiniteError` if a split's loss is not finite."""
  epoch_sums = layout.get(layout.map(lambda chunk: chunk.epoch_sums, state))
  of_seeds = []
  for k, seed in enumerate(layout.seeds):
    rate = notes["learning_rate"][k]
    count = float(epoch_sums[k]["count"])
    values = {"learning_rate": rate} | {
      f"train_{name}": float(total) / count
      for name, total in epoch_sums[k].items()
      # A metric that the restored checkpoint lacked is NaN in this epoch.
      if name != "count" and not math.isnan(total)
    }
    for split, score in scores.items():
      means = score.networks[k]
      if not math.isfinite(means["loss"]):
        raise errors.NonFiniteError(
          f"the {split} loss{layout.seed_suffix(seed)} is {means['loss']} after"
          f" step {state.step - 1} (0-based), at learning rate {rate:g}. In"
          " another --workdir lower optimizer.learning_rate or"
          " model.batch_norm_momentum."
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
  summary = metrics.summarize(layout.seeds, of_seeds, ensembles)
  return {
    "epoch": epoch,
    "step": state.step,
    **summary,
    "epoch_seconds": seconds,
    "data_seconds": notes["data_seconds"],
    "images_per_second": num_images / seconds,
  }
