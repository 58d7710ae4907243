"""Trained networks from their workdirs: for notebooks and for scoring."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_flax import (
  data as datasets,
  experiment as experiment_lib,
  step as train_step,
)
from resnet_flax.parallel import (
  evaluate,
  mesh as mesh_lib,
  networks as seeds_lib,
)
from resnet_flax.run import (
  checkpoint,
  errors,
  folder as workdir_lib,
  metrics,
  rules,
)

CHECKPOINTS = ("best", "latest")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A trained network.

  Attributes:
    model: the Flax module.
    variables: {'params': ..., 'batch_stats': ...}, float32, for
      `model.apply(variables, normalised_images, train=False)`.
    predict: maps uint8[N, H, W, C] images to float32[N, classes]
      probabilities; normalises as in training.
    config: the configuration it was trained with.
    step: the training step of the checkpoint.
    seed: what it was trained with.
  """

  model: nn.Module
  variables: dict[str, Any]
  predict: Callable[[np.ndarray], np.ndarray]
  config: ConfigDict
  step: int
  seed: int


def load_model(
  workdir: str | os.PathLike[str],
  which: str = "best",
  *,
  seed: int | None = None,
) -> LoadedModel:
  """Loads a network from its workdir.

  Args:
    workdir: the run's folder, or what `resnet_flax.convert` made.
    which: 'best' (the epoch that is best by `checkpoint.monitor`; before the
      first one, converted weights) or 'latest'.
    seed: which network of a run of several seeds; by default the first.

  Raises:
    ConfigError: `which` is neither, or the run has no such seed.
    WorkdirError: there is no readable run or no checkpoint there.
  """
  config, experiment, states = _restore(pathlib.Path(workdir), which)
  seed = config.seed if seed is None else seed
  place = seed - config.seed
  if not 0 <= place < len(states):
    last = config.seed + len(states) - 1
    raise errors.ConfigError(
      f"seed={seed} was not trained in {workdir}; needed: one from"
      f" {config.seed} to {last}."
    )
  state = jax.device_put(
    states[place],
    mesh_lib.replicated(mesh_lib.create_mesh(jax.local_devices())),
  )
  logits_fn = jax.jit(
    functools.partial(train_step.apply_eval, experiment.model)
  )

  def predict(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    expected = experiment.image_shape
    if images.dtype != np.uint8 or images.shape[1:] != expected:
      raise ValueError(
        f"predict needs uint8 images of shape [N, {expected[0]},"
        f" {expected[1]}, {expected[2]}]; got {images.dtype}"
        f"{list(images.shape)}."
      )
    batch = config.eval_batch_size
    parts = [
      np.asarray(jax.nn.softmax(logits_fn(state, images[i : i + batch])))
      for i in range(0, len(images), batch)
    ]
    classes = experiment_lib.num_classes(config)
    return np.concatenate([np.empty((0, classes), np.float32), *parts])

  return LoadedModel(
    model=experiment.model,
    variables={"params": state.params, "batch_stats": state.batch_stats},
    predict=predict,
    config=config,
    step=int(state.step),
    seed=seed,
  )


def evaluate_workdir(
  workdir: pathlib.Path,
  which: str = "best",
  *,
  config: ConfigDict | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:
  """Scores a checkpoint of a run on the test split of its data set.

  Args:
    workdir: the run's folder.
    which: 'best' or 'latest'.
    config: replaces the stored configuration; only keys that do not change
      the mathematics may differ, for example where the data is, and
      `dataset.test_crops`.
    devices: what to compute on, by default all devices.

  Returns:
    `loss`, `accuracy` (a fraction), the `step` of the checkpoint (steps done)
    and, but for step 0, its 0-based `epoch`, which may not be at its end. Of
    several seeds `seeds`, a list of these, each with its `seed` and for its own
    best epoch; `ensemble_loss` and `ensemble_accuracy`; and the means of `loss`
    and `accuracy`, with their sample standard deviations as NAME_std.

  Raises:
    ConfigError, WorkdirError: see `load_model`.
    DataError: the data cannot be had.
  """
  config, experiment, states = _restore(workdir, which, config)
  rules.check_labels(config)
  dataset = datasets.load(config.dataset)
  layout = seeds_lib.Layout.create(config, devices)
  scores = evaluate.evaluate(
    evaluate.jit_eval_step(experiment, layout),
    layout.put(states),
    dataset.test,
    config.eval_batch_size,
    layout,
  )
  of_seeds = []
  for state, score in zip(states, scores.networks, strict=True):
    step = int(state.step)
    values = {
      "loss": score["loss"],
      "accuracy": score["accuracy"],
      "step": step,
    }
    if step:
      values["epoch"] = (step - 1) // experiment.learning_rate.steps_per_epoch
    of_seeds.append(values)
  if scores.ensemble is None:
    return of_seeds[0]
  ensemble = {f"ensemble_{key}": v for key, v in scores.ensemble.items()}
  result = metrics.summarize({}, layout.seeds, of_seeds, ensemble)
  # Each seed has its own.
  return {k: v for k, v in result.items() if k not in ("step", "epoch")}


def _restore(
  workdir: pathlib.Path,
  which: str,
  config: ConfigDict | None = None,
) -> tuple[ConfigDict, train_step.Experiment, list[train_step.TrainState]]:
  """What a workdir holds; the state of each seed, as NumPy arrays."""
  if which not in CHECKPOINTS:
    raise errors.unknown_name("checkpoint", which, CHECKPOINTS)
  given = config
  config = given or workdir_lib.load_config(workdir)
  # The batch size of training does not matter here, nor do its devices.
  rules.check(config, num_devices=1)
  if given is not None:
    workdir_lib.check_same(workdir, given, free=["dataset.test_crops"])
  experiment = experiment_lib.build(config)
  missing = errors.WorkdirError(
    f"{workdir} has no {which} checkpoint: the best one is there after the"
    " first epoch, the latest one after checkpoint.every_minutes."
  )
  if not (workdir / "checkpoints").is_dir():
    raise missing
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    steps = _choose_steps(workdir, which, config, checkpoints.steps())
    if not steps:
      raise missing
    like = experiment_lib.abstract_state(config, experiment)
    restored = {
      step: seeds_lib.unstack(
        checkpoints.restore(step, like)[0], config.num_seeds
      )
      for step in set(steps)
    }
  states = [restored[step][place] for place, step in enumerate(steps)]
  return config, experiment, states


def _choose_steps(
  workdir: pathlib.Path, which: str, config: ConfigDict, steps: list[int]
) -> list[int]:
  """The step of each seed's checkpoint; none if there is none."""
  if which == "latest":
    return [max(steps)] * config.num_seeds if steps else []
  # A record may be there before its checkpoint is.
  records = [
    record
    for record in metrics.MetricsLog(workdir).read()
    if record["step"] in steps
  ]
  if not records:
    # `convert` saves what a run starts from: until an epoch is over there is
    # nothing better.
    return [0] * config.num_seeds if 0 in steps else []
  best = metrics.best_records(records, config.checkpoint.monitor)
  return [record["step"] for record in best]
