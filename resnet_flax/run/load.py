"""Loads trained networks from workdirs: to use, to score, to start from."""

import dataclasses
import functools
import logging
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_flax import step as step_lib
from resnet_flax.data import dataset as dataset_lib, prepared, types
from resnet_flax.models import other_blocks, registry
from resnet_flax.parallel import averaging, evaluate, mesh as mesh_lib, networks
from resnet_flax.run import (
  checkpoint,
  errors,
  experiment as experiment_lib,
  folder,
  metrics,
  mirror,
  rules,
)

_logger = logging.getLogger(__name__)

CHECKPOINTS = ("best", "latest")

_TRIES = 5  # To read a run that still trains and removes old checkpoints.

# Keys of `model` that may differ from the run that weights come from: they do
# not change what the network computes.
_MAY_DIFFER = (
  *("num_classes", "input_size", "dtype", "remat", "scan"),
  *("dropout", "block_dropout", "batch_norm_groups", "gate_bias"),
  "batch_norm_momentum",
)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A trained network."""

  model: nn.Module  # The Flax module.
  # {'params': ..., 'batch_stats': ...}, float32, for `model.apply(variables,
  # normalised_images, train=False)`; `predict` does not depend on this dict.
  variables: dict[str, Any] = dataclasses.field(repr=False)
  # Maps uint8[N, H, W, C] images to float32[N, classes] probabilities;
  # normalises as in training. Can be traced. Raises ValueError for other
  # images, and RuntimeError after os.fork(), where JAX would hang.
  predict: Callable[[Any], Any]
  # Maps uint8[N, H, W, C] images to what `model.apply` takes, float32[N, H, W,
  # C]; can be traced.
  preprocess: Callable[[jax.Array], jax.Array]
  # The data set's names, in the order of the labels; () if they are unknown, or
  # the head has another number of classes.
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]  # (H, W, C) that `predict` takes.
  # The configuration it was trained with.
  config: ConfigDict = dataclasses.field(repr=False)
  step: int  # The checkpoint's number of training steps.
  seed: int  # The network's seed in its run.
  weights: str = "raw"  # One of `averaging.WEIGHTS`.


def load_model(
  workdir: str | os.PathLike[str],
  which: str = "best",
  *,
  seed: int | None = None,
  weights: str = "raw",
) -> LoadedModel:
  """Loads a network from its workdir.

  Args:
    workdir: the run's folder, one that `resnet_flax.convert` made, or an
      address of `checkpoint.mirror`.
    which: 'best' (the best epoch by `checkpoint.monitor`; before one is scored,
      the checkpoint of step 0, such as converted weights) or 'latest'.
    seed: which network of a run of several seeds; by default the first.
    weights: 'raw' (the step's own), 'ema' or 'swa' (averages up to it).

  Raises:
    ConfigError: `which` or `weights` is unknown, or the run lacks this seed.
    WorkdirError: there is no readable run, or no such checkpoint or weights.
  """
  # Other files are read from there, too: a new copy may hold a later state.
  local = mirror.local(workdir, "workdir")
  config = folder.load_config(local)
  seed = config.seed if seed is None else seed
  experiment, (state,) = _restore(local, config, which, weights, seed)
  mesh = mesh_lib.create_mesh(jax.local_devices())
  state = jax.device_put(state, mesh_lib.sharding(mesh))
  logits_fn = jax.jit(functools.partial(step_lib.apply_eval, experiment.model))
  names = (folder.read_facts(local) or ((),))[0]
  pid = os.getpid()

  def predict(images: Any) -> Any:
    if os.getpid() != pid:
      raise RuntimeError(
        "predict would hang after os.fork(), as JAX has threads. Start the"
        " process by spawn or forkserver, and call load_model there."
      )
    is_traced = isinstance(images, jax.core.Tracer)
    images = images if is_traced else np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != experiment.image_shape:
      shape = ", ".join(["N", *map(str, experiment.image_shape)])
      raise ValueError(
        f"predict needs uint8 images of shape [{shape}]; got"
        f" {images.dtype}{list(images.shape)}."
      )
    if is_traced:
      return jax.nn.softmax(logits_fn(state, images))
    size = config.eval_batch_size
    parts = [
      np.asarray(jax.nn.softmax(logits_fn(state, images[i : i + size])))
      for i in range(0, len(images), size)
    ]
    empty = np.empty((0, experiment.num_classes), np.float32)
    return np.concatenate([empty, *parts])

  return LoadedModel(
    model=experiment.model,
    # Copies of the dictionaries: changing them must not change `predict`.
    variables=jax.tree.map(lambda a: a, state.variables),
    predict=predict,
    preprocess=state.normalization,
    class_names=names if len(names) == experiment.num_classes else (),
    image_shape=experiment.image_shape,
    config=config,
    step=int(state.step),
    seed=seed,
    weights=weights,
  )


def evaluate_workdir(
  workdir: str | os.PathLike[str],
  which: str = "best",
  weights: str = "raw",
  split: str = "test",
  *,
  config: ConfigDict | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:
  """Scores a checkpoint of a run on a split of its data set.

  See `load_model` for `workdir`, `which` and `weights`. `split` is 'train' (the
  images that the run trained on, not augmented), 'val' (those that it held out)
  or 'test'. `config` replaces the stored configuration. It may differ in
  `dataset.test_crops` and in the keys of `run.config.MAY_DIFFER`, for example
  in where the data is. Raises as `load_model`, and `DataError`.

  Returns:
    `loss`; the fractions `accuracy` and, for ten classes or more, `top5`; the
    checkpoint's `step` (steps done) and, except for step 0, its 0-based
    `epoch`, which may be unfinished. For several seeds, the means of the
    scores, sample standard deviations as NAME_std, `ensemble_loss` and so on,
    and `seeds`: the above for each `seed`, at its own checkpoint.
  """
  local = mirror.local(workdir, "workdir")
  is_stored = config is None
  config = folder.load_config(local) if config is None else config
  experiment, states = _restore(
    local, config, which, weights, is_stored=is_stored
  )
  if is_stored:
    _log_data_paths(config)
  try:
    rules.check_num_classes(config)
    dataset = dataset_lib.load(config.dataset)
  except errors.DataError as error:
    if not (is_stored and config.dataset.data_dir):
      raise
    raise errors.DataError(
      f"{error} The run's config.json names {config.dataset.data_dir}: for data"
      " elsewhere pass --config=FILE --config.dataset.data_dir=DIR, too."
    ) from error
  folder.check_data(local, dataset.source)
  splits = {"train": dataset.train, "test": dataset.test}
  if dataset.validation:
    splits["val"] = dataset.validation
  if split not in splits:
    raise errors.ConfigError(
      f"split={split}: {workdir} has {' and '.join(sorted(splits))}. A run has"
      " val if it holds out images, by dataset.validation_examples."
    )
  layout = networks.Layout.create(config, devices)
  scores = evaluate.evaluate(
    evaluate.create_eval_step(experiment, layout),
    layout.put(states),
    splits[split],
    config.eval_batch_size,
    layout,
  )
  of_seeds = []
  for state, means in zip(states, scores.networks, strict=True):
    step = int(state.step)
    values = {k: v for k, v in means.items() if k != "objective"}
    values["step"] = step
    if step:
      values["epoch"] = (step - 1) // experiment.learning_rate.steps_per_epoch
    of_seeds.append(values)
  if scores.ensemble is None:
    return of_seeds[0]
  ensemble = {f"ensemble_{key}": v for key, v in scores.ensemble.items()}
  result = metrics.summarize(layout.seeds, of_seeds, ensemble)
  # Seeds may have checkpoints of different steps: a mean of them says nothing.
  dropped = ("step", "epoch", "step_std", "epoch_std")
  return {k: v for k, v in result.items() if k not in dropped}


class Predictions(NamedTuple):
  """What one checkpoint predicts for each of N test images."""

  dataset: types.Dataset
  labels: np.ndarray  # int32[N].
  probabilities: np.ndarray  # float32[N, classes].
  step: int  # The checkpoint's number of training steps.


def predict_test(
  workdir: pathlib.Path,
  seed: int,
  which: str = "best",
  weights: str = "raw",
  *,
  opened: dict[str, types.Dataset],
) -> Predictions:
  """Predicts the test images with a seed's checkpoint; see `load_model`.

  `opened` maps `config.dataset`, as JSON, to data sets. This call adds its own,
  so that calls that share the dict open each data set once.
  """
  # Before the data, which takes longer to open.
  loaded = load_model(workdir, which, seed=seed, weights=weights)
  rules.check_num_classes(loaded.config)
  key = loaded.config.dataset.to_json()
  if key not in opened:
    _log_data_paths(loaded.config)
    opened[key] = dataset_lib.load(loaded.config.dataset)
  dataset = opened[key]
  folder.check_data(workdir, dataset.source)
  size = evaluate.call_size(dataset.test, loaded.config.eval_batch_size, 1)
  positions = np.arange(len(dataset.test))
  order = [positions[start : start + size] for start in positions[::size]]
  probabilities, labels = [], []
  for images, batch_labels in dataset.test.batches(order):
    # An image may have several crops; average their probabilities.
    outputs = loaded.predict(images.reshape(-1, *images.shape[-3:]))
    outputs = outputs.reshape(len(images), -1, outputs.shape[-1]).mean(axis=1)
    probabilities.append(outputs)
    labels.append(batch_labels)
  return Predictions(
    dataset, np.concatenate(labels), np.concatenate(probabilities), loaded.step
  )


def _log_data_paths(config: ConfigDict) -> None:
  """Logs the data paths of a stored configuration: it may be a stranger's."""
  for name in ("data_dir", "archive", "cache_dir"):
    if config.dataset[name]:
      _logger.warning(
        "note: scored on the data in dataset.%s=%s, as config.json says",
        *(name, config.dataset[name]),
      )


def check_local_data(config: ConfigDict, workdir: pathlib.Path) -> None:
  """Checks a finished run's data if it is on this machine; downloads none."""
  dataset = config.dataset
  try:
    if dataset.name.startswith("cifar"):
      root = prepared.data_dir(dataset.data_dir)
      if prepared.find(dataset.name, root) is None:
        raise errors.DataError(f"there is no {dataset.name} in {root}")
    source = dataset_lib.load(dataset).source
  except errors.UserError as error:
    _logger.info("note: the run's data was not checked: %s", error)
  else:
    folder.check_data(workdir, source)


def _restore(
  workdir: pathlib.Path,
  config: ConfigDict,
  which: str,
  weights: str,
  seed: int | None = None,
  *,
  is_stored: bool = True,  # Whether `config` is the one in the folder.
) -> tuple[step_lib.Experiment, list[step_lib.TrainState]]:
  """The experiment and the states of a seed, or of all, as NumPy arrays."""
  if which not in CHECKPOINTS:
    raise errors.unknown_name("checkpoint", which, CHECKPOINTS)
  if weights not in averaging.WEIGHTS:
    raise errors.unknown_name("weights", weights, averaging.WEIGHTS)
  facts = folder.read_facts(workdir)
  # The training batch size need not suit the devices that are used here.
  rules.check(config, num_devices=1, facts=facts)
  if not is_stored:
    folder.check_same(workdir, config, free=["dataset.test_crops"])
  experiment = experiment_lib.build(config, facts)
  like = experiment_lib.abstract_state(config, experiment)
  seeds: Sequence[int] = range(config.seed, config.seed + config.num_seeds)
  if seed not in (None, *seeds):
    raise errors.ConfigError(
      f"seed={seed} was not trained in this run: it must be from {seeds[0]} to"
      f" {seeds[-1]}."
    )
  seeds = seeds if seed is None else [seed]
  for tries_left in reversed(range(_TRIES)):
    try:
      states = _read_states(workdir, which, config, like, seeds)
      break
    except errors.WorkdirError:
      if not tries_left:
        raise
      time.sleep(0.1)
  for state in states:
    epochs = int(state.step) // experiment.learning_rate.steps_per_epoch
    if weights not in (available := averaging.available(config, epochs)):
      advice = (
        "A run keeps averages from its start on: --config.ema.decay=0.999, or"
        " --config.swa.start_epoch."
      )
      if weights in averaging.available(config, config.num_epochs):
        advice = f"Its average begins after epoch {config.swa.start_epoch}."
        if which != "latest":
          advice += " Take the latest checkpoint (--checkpoint=latest)."
      raise errors.WorkdirError(
        f"{workdir} has no weights={weights} at step {state.step}, its {which}"
        f" checkpoint's; it has {' and '.join(available)}. {advice}"
      )
  return experiment, [averaging.select(state, weights) for state in states]


def _read_states(
  workdir: pathlib.Path,
  which: str,
  config: ConfigDict,
  like: step_lib.TrainState,
  seeds: Sequence[int],
) -> list[step_lib.TrainState]:
  """The states of these seeds; fails if a checkpoint is removed meanwhile."""
  try:
    saved_steps = checkpoint.steps(workdir)
  except OSError as error:
    raise errors.WorkdirError(
      f"{workdir} cannot be read: {errors.one_line(error)}. Try again."
    ) from error
  if which == "latest":
    steps = saved_steps[-1:] * config.num_seeds
  else:
    records = metrics.MetricsLog(workdir, config).read()
    # The last record may be written before its checkpoint is complete.
    if records and records[-1]["step"] > max(saved_steps, default=-1):
      records.pop()
    best = metrics.best_records(records, config.checkpoint.monitor)
    steps = [record["step"] for record in best]
    if not steps and 0 in saved_steps:
      # No epoch is scored yet: the best is step 0, as `convert` saves it.
      steps = [0] * config.num_seeds
  if not steps or not (workdir / "checkpoints").is_dir():
    raise errors.WorkdirError(
      f"{workdir} has no {which} checkpoint: a run has a best one after its"
      " first scored epoch, a latest one after checkpoint.every_minutes or an"
      " epoch. Wait for it, or pass another workdir."
    )
  seed_steps = [steps[seed - config.seed] for seed in seeds]
  if missing := sorted({*seed_steps} - {*saved_steps}):
    raise errors.WorkdirError(
      f"{workdir} has no checkpoint of step {missing[0]}, its best epoch's;"
      f" it has {', '.join(map(str, saved_steps)) or 'none'}. Copy the missing"
      " one there, or take the latest."
    )
  restored = {}
  for step in {*seed_steps}:
    stacked, _ = checkpoint.restore(workdir, step, like)
    restored[step] = networks.unstack(stacked, config.num_seeds)
  by_seed = zip(seeds, seed_steps, strict=True)
  return [restored[step][seed - config.seed] for seed, step in by_seed]


# ---- Starting from another run's weights


def load_source(config: ConfigDict) -> dict[str, Any]:
  """The variables of the best checkpoint in `config.init_from`.

  The head is left out if it was trained on another data set, or on classes of
  another number or other names.
  """
  workdir = errors.local_path(config.init_from, "init_from")
  if not os.path.isdir(workdir):
    raise errors.WorkdirError(
      f"init_from={workdir} is not a folder. Pass a run's workdir;"
      " resnet_flax.convert makes one from a file of weights."
    )
  try:
    source = load_model(workdir)
  except errors.UserError as error:
    message = f"init_from={workdir} cannot be used: {error}"
    raise errors.WorkdirError(message) from error
  source_keys, own_keys = _network(source.config.model), _network(config.model)
  if differing := errors.differences(source_keys, own_keys):
    raise errors.ConfigError(
      f"init_from={workdir} holds another network, which differs in"
      f" {', '.join(differing)}. Pass its values, or another init_from."
    )
  if config.normalization != source.config.normalization:
    _logger.warning(
      "warning: normalization=%s, but the weights of init_from were trained"
      " with %s",
      config.normalization,
      source.config.normalization,
    )
  _logger.info("starting from step %d of %s", source.step, workdir)
  info, params = dataset_lib.info(config.dataset), source.variables["params"]
  classes = config.model.num_classes or info.num_classes
  if (
    source.config.dataset.name != config.dataset.name
    or len({source.class_names, info.class_names} - {()}) > 1
    or len(params["head"]["bias"]) != classes
  ):
    del params["head"]
    _logger.info("init_from's head has other classes: the new head is random")
  return source.variables


def _network(model: ConfigDict) -> dict[str, Any]:
  """The keys that define the network, with its family's default values."""
  chosen = model.to_dict() | {
    "shortcut": registry.shortcut(model),
    "num_filters": registry.num_filters(model),
    "groups": other_blocks.num_groups(model),
    "group_width": model.group_width or registry.num_filters(model),
  }
  return {
    f"model.{key}": value
    for key, value in chosen.items()
    if key not in _MAY_DIFFER
  }
