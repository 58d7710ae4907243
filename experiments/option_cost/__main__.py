"""Measures each option's cost in a training step, in turn with no option.

  python -m experiments.option_cost --out=results.json [--rounds=7] [--steps=6]
    [--batch_size=128]

One batch of noise stays in memory; augmentation is part of the step. Nothing
else should run meanwhile.
"""

import argparse
import functools
import statistics
from typing import Any

import jax

from experiments.tools import flag_types, markdown, timing
from resnet_flax.configs import v1_depth20
from resnet_flax.run import environment, files, huge_pages, surroundings

NONE = "none"
# AdamW takes no L2 term.
_DECAY = {"optimizer.l2": 0.0, "optimizer.weight_decay": 0.01}
OPTIONS: dict[str, dict[str, Any]] = {
  NONE: {},
  "ema.decay=0.999": {"ema.decay": 0.999},
  "optimizer.name=sgd": {"optimizer.name": "sgd"},
  "optimizer.name=adamw": {"optimizer.name": "adamw", **_DECAY},
  "optimizer.name=lamb": {"optimizer.name": "lamb"},
  "optimizer.name=lion": {"optimizer.name": "lion"},
  "optimizer.name=muon": {"optimizer.name": "muon"},
  "optimizer.clip_norm=1": {"optimizer.clip_norm": 1.0},
  "optimizer.accumulate_steps=4": {"optimizer.accumulate_steps": 4},
  "augment.mixup=0.2": {"augment.mixup": 0.2},
  "augment.cutmix=1": {"augment.cutmix": 1.0},
  "augment.alternating_flip=true": {"augment.alternating_flip": True},
  "augment.cutout=16": {"augment.cutout": 16},
  "augment.trivial_augment=true": {"augment.trivial_augment": True},
  "log.norms=true": {"log.norms": True},
  "model.squeeze_excitation=16": {"model.squeeze_excitation": 16},
  "model.stochastic_depth=0.2": {"model.stochastic_depth": 0.2},
  "model.norm=group_norm": {"model.norm": "group_norm"},
  "model.weight_standardization=true": {"model.weight_standardization": True},
}


def measure(
  options: dict[str, dict[str, Any]], batch_size: int, rounds: int, steps: int
) -> dict[str, list[float]]:
  """Images/s of ResNet-20 v1 with each option in each round."""
  windows = {}
  for name, overrides in options.items():
    config = v1_depth20.get_config()
    config.batch_size = batch_size
    config.update_from_flattened_dict(overrides)
    split = timing.noise(config)
    trainer = timing.prepare(config, split, jax.devices()[:1])
    windows[name] = functools.partial(trainer.repeat, steps)
  return {
    name: [batch_size * steps / seconds for seconds in by_round]
    for name, by_round in timing.in_turn(windows, rounds).items()
  }


def table(results: dict[str, Any]) -> str:
  """Each option's speed divided by the speed without options, by round."""
  speeds = results["images_per_second"]
  rows = []
  for name, values in speeds.items():
    if name != NONE:
      shares = [a / b for a, b in zip(values, speeds[NONE], strict=True)]
      median = statistics.median(shares)
      extent = f"{min(shares):.2f} to {max(shares):.2f}"
      rows.append([f"`{name}`", f"{median:.2f}", extent])
  return markdown.table(("option", "share of the speed without", "range"), rows)


def main() -> None:
  """Measures, prints a table and writes the raw figures."""
  parser = argparse.ArgumentParser("python -m experiments.option_cost")
  parser.add_argument("--batch_size", type=flag_types.count, default=128)
  parser.add_argument("--rounds", type=flag_types.count, default=7)
  parser.add_argument(
    "--steps", type=flag_types.count, default=6, help="of a window"
  )
  parser.add_argument("--out", type=flag_types.output, required=True)
  arguments = parser.parse_args()
  surroundings.set_up()
  sizes = arguments.batch_size, arguments.rounds, arguments.steps
  results = {
    "batch_size": arguments.batch_size,
    "steps": arguments.steps,
    "environment": environment.describe(jax.devices()),
    "images_per_second": measure(OPTIONS, *sizes),
  }
  print(table(results))
  files.write_json(arguments.out, results)


if __name__ == "__main__":
  huge_pages.use()
  main()
