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
  checkpoint,
  config_rules,
  datasets,
  errors,
  evaluate,
  experiment as experiment_lib,
  mesh as mesh_lib,
  metrics,
  train_step,
  workdir as workdir_lib,
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
  """

  model: nn.Module
  variables: dict[str, Any]
  predict: Callable[[np.ndarray], np.ndarray]
  config: ConfigDict
  step: int


def load_model(
  workdir: str | os.PathLike[str], which: str = "best"
) -> LoadedModel:
  """Loads a network from its workdir.

  Args:
    workdir: the run's folder, or what `resnet_flax.convert` made.
    which: 'best' (the epoch that is best by `checkpoint.monitor`; before the
      first one, converted weights) or 'latest'.

  Raises:
    ConfigError: `which` is neither.
    WorkdirError: there is no readable run or no checkpoint there.
  """
  config, experiment, state = _restore(pathlib.Path(workdir), which)
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
  )


def evaluate_workdir(
  workdir: pathlib.Path,
  which: str = "best",
  *,
  config: ConfigDict | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> dict[str, float]:
  """Scores a checkpoint of a run on the test split of its data set.

  Args:
    workdir: the run's folder.
    which: 'best' or 'latest'.
    config: replaces the stored configuration; only keys that do not change
      the mathematics may differ, for example where the data is.
    devices: what to compute on, by default all devices.

  Returns:
    `loss`, `accuracy` (a fraction), the `step` of the checkpoint (steps done)
    and, but for step 0, its 0-based `epoch`, which may not be at its end.

  Raises:
    ConfigError, WorkdirError: see `load_model`.
    DataError: the data cannot be had.
  """
  if config is not None:
    workdir_lib.check_same(workdir, config)
  config, experiment, state = _restore(workdir, which, config, devices)
  config_rules.check_labels(config)
  dataset = datasets.load(config.dataset)
  scores = evaluate.evaluate(
    evaluate.jit_eval_step(experiment),
    state,
    dataset.test,
    config.eval_batch_size,
    mesh_lib.create_mesh(devices),
  )
  step = int(state.step)
  result = {
    "loss": scores["loss"],
    "accuracy": scores["accuracy"],
    "step": step,
  }
  if step:
    result["epoch"] = (step - 1) // experiment.learning_rate.steps_per_epoch
  return result


def _restore(
  workdir: pathlib.Path,
  which: str,
  config: ConfigDict | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> tuple[ConfigDict, train_step.Experiment, train_step.TrainState]:
  if which not in CHECKPOINTS:
    raise errors.unknown_name("checkpoint", which, CHECKPOINTS)
  config = config or workdir_lib.load_config(workdir)
  # The batch size of training does not matter here, nor do its devices.
  config_rules.check(config, num_devices=1)
  experiment = experiment_lib.build(config)
  missing = errors.WorkdirError(
    f"{workdir} has no {which} checkpoint: the best one is there after the"
    " first epoch, the latest one after checkpoint.every_minutes."
  )
  if not (workdir / "checkpoints").is_dir():
    raise missing
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    step = _choose_step(workdir, which, config, checkpoints.steps())
    if step is None:
      raise missing
    state, _ = checkpoints.restore(
      step,
      experiment_lib.abstract_state(config, experiment),
      mesh_lib.create_mesh(devices),
    )
  return config, experiment, state


def _choose_step(
  workdir: pathlib.Path, which: str, config: ConfigDict, steps: list[int]
) -> int | None:
  if which == "latest":
    return max(steps, default=None)
  # A record may be there before its checkpoint is.
  records = [
    record
    for record in metrics.MetricsLog(workdir).read()
    if record["step"] in steps
  ]
  if not records:
    # `convert` saves what a run starts from: until an epoch is over there is
    # nothing better.
    return 0 if 0 in steps else None
  return metrics.best_record(records, config.checkpoint.monitor)["step"]
