"""Workdirs as runs leave them, without the runs."""

import json

import numpy as np

from configs import base

METRICS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


def make_config(**overrides):
  """The base configuration; `model__depth` stands for model.depth."""
  config = base.get_config().unlock()
  config.num_epochs = 3
  config.num_seeds = overrides.pop("num_seeds", 1)
  config.update_from_flattened_dict(
    {key.replace("__", "."): value for key, value in overrides.items()}
  )
  return config


def make_record(epoch, accuracy, **more):
  """A record of an epoch; `accuracy` is the test split's."""
  return {
    "epoch": epoch,
    "step": 100 * (epoch + 1),
    "learning_rate": 1e-3,
    "train_loss": 1.5 - accuracy,
    "train_objective": 1.7 - accuracy,
    "train_accuracy": accuracy - 0.05,
    "test_loss": 1.4 - accuracy,
    "test_objective": 1.6 - accuracy,
    "test_accuracy": accuracy,
    "epoch_seconds": 10.0 + epoch,
    "images_per_second": 3200 / (10.0 + epoch),
    **more,
  }


def make_seeds_record(epoch, first_seed, accuracies):
  """A record of an epoch in which several seeds were trained together."""
  of_seeds = [
    {"seed": first_seed + k} | make_record(epoch, accuracy)
    for k, accuracy in enumerate(accuracies)
  ]
  record = make_record(epoch, float(np.mean(accuracies)))
  for key in METRICS:
    values = [of_seed[key] for of_seed in of_seeds]
    record[f"{key}_std"] = float(np.std(values, ddof=1))
  ensemble = {"test_ensemble_loss": 0.1, "test_ensemble_accuracy": 0.95}
  return record | ensemble | {"seeds": of_seeds}


def write(folder, accuracies=(0.5, 0.7, 0.6), *, config=None, **overrides):
  """A workdir whose epochs have the given test accuracies.

  Of several seeds, each epoch has as many accuracies.
  """
  config = config or make_config(**overrides)
  records = [
    make_record(epoch, accuracy)
    if np.ndim(accuracy) == 0
    else make_seeds_record(epoch, config.seed, accuracy)
    for epoch, accuracy in enumerate(accuracies)
  ]
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config.to_dict()))
  if records:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
  return folder
