"""The loop: everything that reads, writes or waits happens here."""

import contextlib
import functools
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import (
  checkpoint,
  config_rules,
  datasets,
  errors,
  evaluate,
  experiment as experiment_lib,
  interruption,
  mesh as mesh_lib,
  metrics,
  normalization,
  progress as progress_lib,
  randomness,
  train_step,
  transfer,
  workdir as workdir_lib,
)

_logger = logging.getLogger(__name__)

# What a checkpoint's notes are before the first step of an epoch.
NEW_EPOCH: checkpoint.Notes = {"learning_rate": 0.0, "epoch_seconds": 0.0}

CompiledStep = Callable[
  ..., tuple[train_step.TrainState, train_step.StepMetrics]
]


def train_and_evaluate(
  config: ConfigDict,
  workdir: pathlib.Path,
  *,
  devices: Sequence[jax.Device] | None = None,
  signals: interruption.StopSignals | None = None,
) -> list[metrics.Record]:
  """Trains as the configuration says; goes on with what the workdir holds.

  Args:
    config: every key of `configs/base.py`.
    workdir: gets config.json, environment.json, metrics.jsonl, checkpoints/
      and tensorboard/. If it holds an unfinished run of this configuration,
      the run goes on after the latest step that was saved, to the same bits.
    devices: what to train on, by default all devices.
    signals: how SIGINT and SIGTERM are met.

  Returns:
    The records of all epochs, as in metrics.jsonl.

  Raises:
    ConfigError: a value that cannot be used; before anything is compiled.
    WorkdirError: the workdir is in use, or cannot be read or written.
    DataError: the data cannot be had.
    NonFiniteError: the loss or the state became infinite or NaN.
    Interrupted: SIGINT or SIGTERM; the step in progress is finished and saved.
  """
  mesh = mesh_lib.create_mesh(devices)
  config_rules.check(config, num_devices=mesh.size)
  config_rules.check_labels(config)
  workdir = pathlib.Path(workdir).absolute()
  experiment = experiment_lib.build(config)
  steps_per_epoch = experiment.learning_rate.steps_per_epoch
  monitor = config.checkpoint.monitor
  records: list[metrics.Record] = []

  def best_step() -> int | None:
    return metrics.best_record(records, monitor)["step"] if records else None

  with contextlib.ExitStack() as stack:
    signals = stack.enter_context(signals or interruption.StopSignals())
    with workdir_lib.explain_write_errors(workdir):
      stack.enter_context(workdir_lib.use(workdir, config))
      checkpoints = stack.enter_context(
        checkpoint.Checkpoints(workdir, best_step=best_step)
      )
    stack.enter_context(_explain_interruption(workdir, checkpoints, signals))

    with workdir_lib.explain_write_errors(workdir):
      restored = None
      # Tracing a deep network takes long: not for a run that is new.
      if checkpoints.steps():
        like = experiment_lib.abstract_state(config, experiment)
        restored = checkpoints.restore_latest(like, mesh)
      step = int(restored[0].step) if restored else 0
      log = metrics.MetricsLog(workdir)
      records += log.cut_back(
        step, steps_per_epoch, fallen_back=checkpoints.has_fallen_back(step)
      )
    if len(records) == config.num_epochs:
      _logger.info("%s is finished: %d epochs.", workdir, len(records))
      return records

    # What is wrong with it is said before the data is prepared.
    source = None
    if config.init_from and not restored:
      source = transfer.load(config)
    dataset = datasets.load(config.dataset)
    with workdir_lib.explain_write_errors(workdir):
      workdir_lib.record_start(
        workdir, config, list(mesh.devices.flat), dataset.source
      )
    if dataset.validation is None:
      _logger.info(
        "note: the best epoch is chosen on the test split, as in the recipe;"
        " set dataset.validation_examples to hold out a part of training"
      )
    if restored:
      _logger.info("going on after step %d of %s", step, workdir)
      state, notes = restored
    else:
      state = initial_state(config, experiment, dataset.train, mesh)
      if source is not None:
        state = transfer.initialize(state, source, mesh)
      notes = NEW_EPOCH
    if records and step == len(records) * steps_per_epoch:
      # An epoch's checkpoint is from before its evaluation.
      state = _after_epoch(state, records[-1], experiment, mesh)
      notes = NEW_EPOCH
    progress = progress_lib.Progress(
      config.num_epochs,
      steps_per_epoch,
      config.batch_size,
      config.log.interval_seconds,
    )
    stack.callback(progress.close)
    key = augmentation_key(config.seed, mesh)
    compiled_step = compile_train_step(
      experiment, state, config.batch_size, key, mesh
    )
    eval_step = evaluate.jit_eval_step(experiment)
    splits = {"val": dataset.validation, "test": dataset.test}

    # From here on a signal waits for the end of a step, and what is being
    # saved is finished before the loop is left.
    stack.enter_context(signals.hold())
    stack.enter_context(workdir_lib.explain_write_errors(workdir, running=True))
    board = stack.enter_context(
      metrics.TensorBoard(
        workdir, len(records) * steps_per_epoch, config.log.tensorboard
      )
    )
    stack.callback(checkpoints.wait)
    if source is not None:
      # So that the run depends no longer on what becomes of its source.
      checkpoints.save(state, notes)
      del source
    timer = checkpoint.Timer(
      config.checkpoint.every_steps, config.checkpoint.every_minutes
    )

    while len(records) < config.num_epochs:
      epoch = len(records)
      first_step = epoch * steps_per_epoch
      taken = int(state.step) - first_step
      progress.start_epoch(epoch, taken)
      batches = epoch_batches(
        dataset.train, config.batch_size, config.seed, epoch, mesh, first=taken
      )
      started = time.perf_counter()
      while taken < steps_per_epoch:
        try:
          state, last = train_steps(
            compiled_step,
            state,
            batches,
            key,
            progress.step,
            until=lambda step: signals.requested or timer.due(step),
          )
        except errors.NonFiniteError as error:
          path = _describe_failure(
            workdir, config, dataset.train, key, error.step, checkpoints
          )
          raise errors.NonFiniteError(
            f"{error} What reproduces the step is in {path}.", error.step
          ) from error
        taken = int(state.step) - first_step
        now = time.perf_counter()
        notes = {
          "learning_rate": float(last.learning_rate),
          "epoch_seconds": notes["epoch_seconds"] + now - started,
        }
        started = now
        workdir_lib.check_not_removed(workdir)
        checkpoints.save(state, notes)
        timer.reset()
        signals.check()
      progress.close()

      started = time.perf_counter()
      scores = {
        name: evaluate.evaluate(
          eval_step,
          state,
          split,
          config.eval_batch_size,
          mesh,
          on_batch=signals.check,
        )
        for name, split in splits.items()
        if split is not None
      }
      record = _record(epoch, state, notes, scores)
      workdir_lib.check_not_removed(workdir)
      # After its checkpoint was started: a record without its checkpoint is
      # cut off, a checkpoint without its record is evaluated again.
      log.append(record)
      records.append(record)
      state = _after_epoch(state, record, experiment, mesh)
      notes = NEW_EPOCH
      board.write(record)
      progress.end_epoch(record, time.perf_counter() - started)
  return records


def initial_state(
  config: ConfigDict,
  experiment: train_step.Experiment,
  train: datasets.Split,
  mesh: Mesh,
) -> train_step.TrainState:
  """The state before the first step, a copy on every device of the mesh."""
  key = randomness.device_key(config.seed, randomness.Purpose.INITIALIZATION)
  state = train_step.create_train_state(
    experiment, key, normalization.measure(config.normalization, train)
  )
  return jax.device_put(state, mesh_lib.replicated(mesh))


def augmentation_key(seed: int, mesh: Mesh) -> jax.Array:
  """The key[] that every training step takes, on all devices of the mesh."""
  return jax.device_put(
    randomness.device_key(seed, randomness.Purpose.AUGMENTATION),
    mesh_lib.replicated(mesh),
  )


def compile_train_step(
  experiment: train_step.Experiment,
  state: train_step.TrainState,
  batch_size: int,
  key: jax.Array,
  mesh: Mesh,
) -> CompiledStep:
  """Compiles one training step for the shapes and devices given.

  The state is donated: the caller's copy is gone after a call.

  Args:
    experiment: the fixed parts.
    state: replicated over the mesh; only its shapes are used.
    batch_size: images of a step, over all devices.
    key: key[], replicated; only its shape is used.
    mesh: the devices.

  Returns:
    A function of (state, uint8[B, H, W, C], int32[B], key).
  """
  started = time.perf_counter()
  _logger.info("compiling the training step")
  sharding = mesh_lib.batch_sharding(mesh)
  images = jax.ShapeDtypeStruct(
    (batch_size, *experiment.image_shape), np.uint8, sharding=sharding
  )
  labels = jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=sharding)
  jitted = jax.jit(
    functools.partial(train_step.train_step, experiment),
    donate_argnums=0,
    out_shardings=mesh_lib.replicated(mesh),
  )
  lowered = jitted.lower(state, images, labels, key)
  compiled = lowered.compile(mesh_lib.compiler_options(mesh))
  _logger.info("compiled in %.1f s", time.perf_counter() - started)
  return compiled


def epoch_order(
  num_examples: int, batch_size: int, seed: int, epoch: int
) -> np.ndarray:
  """Which images each step of an epoch takes, as (seed, epoch) decide.

  A last, smaller batch is dropped.

  Args:
    num_examples: images of the training split.
    batch_size: images of a batch, over all devices.
    seed: the experiment's.
    epoch: 0-based.

  Returns:
    int64[steps, B], positions in the split.
  """
  rng = randomness.host_rng(seed, randomness.Purpose.EPOCH_ORDER, epoch)
  steps = num_examples // batch_size
  order = rng.permutation(num_examples)
  return order[: steps * batch_size].reshape(steps, batch_size)


def epoch_batches(
  split: datasets.Split,
  batch_size: int,
  seed: int,
  epoch: int,
  mesh: Mesh,
  *,
  first: int = 0,
) -> Iterator[tuple[jax.Array, jax.Array]]:
  """The batches of one epoch, in the order of `epoch_order`.

  Args:
    split: what is trained on.
    batch_size: images of a batch, over all devices.
    seed: the experiment's.
    epoch: 0-based.
    mesh: the devices that share a batch.
    first: the step of the epoch to begin with, 0-based.

  Yields:
    (uint8[B, H, W, C], int32[B]), sharded over the mesh.
  """
  for positions in epoch_order(len(split), batch_size, seed, epoch)[first:]:
    yield mesh_lib.shard_batch(mesh, *split.take(positions))


def train_steps(
  compiled_step: CompiledStep,
  state: train_step.TrainState,
  batches: Iterable[tuple[jax.Array, jax.Array]],
  key: jax.Array,
  on_step: Callable[[train_step.StepMetrics], Any],
  until: Callable[[int], bool] = lambda step: False,
) -> tuple[train_step.TrainState, train_step.StepMetrics]:
  """Takes one step for each batch.

  Args:
    compiled_step: from `compile_train_step`.
    state: before the first step; donated.
    batches: (images, labels) pairs, at least one.
    key: key[], the augmentation's.
    on_step: called with the metrics of every step, on the host.
    until: called with the number of steps done so far; true ends the loop.

  Returns:
    The new state and the metrics of the last step, on the host.

  Raises:
    NonFiniteError: a step's objective or the state after it is not finite.
  """
  pending = None
  step = int(state.step)
  for images, labels in batches:
    state, step_metrics = compiled_step(state, images, labels, key)
    step += 1
    # Read one step late: the devices have the next step to work on meanwhile.
    if pending is not None:
      on_step(_read(pending, step - 2))
    pending = step_metrics
    if until(step):
      break
  assert pending is not None  # `config_rules` leaves no empty epoch.
  last = _read(pending, step - 1)
  on_step(last)
  return state, last


def _read(
  step_metrics: train_step.StepMetrics, step: int
) -> train_step.StepMetrics:
  step_metrics = jax.device_get(step_metrics)
  if not step_metrics.finite:
    raise errors.NonFiniteError(
      f"the loss or the state is not finite after step {step} (0-based), at"
      f" learning rate {step_metrics.learning_rate:g}. Lower"
      " optimizer.learning_rate, or warm up with"
      " schedule.warmup_learning_rate.",
      step,
    )
  return step_metrics


def _describe_failure(
  workdir: pathlib.Path,
  config: ConfigDict,
  split: datasets.Split,
  key: jax.Array,
  step: int,
  checkpoints: checkpoint.Checkpoints,
) -> pathlib.Path:
  """Writes what leads to a step that failed, from the checkpoint before it."""
  checkpoints.wait()
  order = functools.partial(
    epoch_order, len(split), config.batch_size, config.seed
  )
  epoch, within = divmod(step, len(split) // config.batch_size)
  path = workdir / "nonfinite_step.json"
  workdir_lib.write_json(
    path,
    {
      "step": step,
      "epoch": epoch,
      "step_in_epoch": within,
      # Of the official training split, whatever part of it is used.
      "batch_indexes": split.indices[order(epoch)[within]].tolist(),
      **{
        f"{name}_key": jax.random.key_data(key).tolist()
        for name, key in train_step.step_keys(key, step).items()
      },
      "latest_checkpoint_step": max(checkpoints.steps(), default=None),
    },
  )
  return path


def _record(
  epoch: int,
  state: train_step.TrainState,
  notes: checkpoint.Notes,
  scores: dict[str, dict[str, float]],
) -> metrics.Record:
  sums = jax.device_get(state.epoch_sums)
  step = int(state.step)
  for name, score in scores.items():
    if not math.isfinite(score["loss"]):
      raise errors.NonFiniteError(
        f"the {name} loss is {score['loss']} after step {step - 1} (0-based),"
        f" at learning rate {notes['learning_rate']:g}. Lower"
        " optimizer.learning_rate or model.batch_norm_momentum.",
        step - 1,
      )
  record = {
    "epoch": epoch,
    "step": step,
    "learning_rate": notes["learning_rate"],
    "train_loss": float(sums.loss / sums.count),
    "train_objective": float(sums.objective / sums.count),
    "train_accuracy": float(sums.correct / sums.count),
  }
  for name, score in scores.items():
    for metric in ("loss", "objective", "accuracy"):
      record[f"{name}_{metric}"] = float(score[metric])
  record["epoch_seconds"] = notes["epoch_seconds"]
  record["images_per_second"] = int(sums.count) / notes["epoch_seconds"]
  return record


def _after_epoch(
  state: train_step.TrainState,
  record: metrics.Record,
  experiment: train_step.Experiment,
  mesh: Mesh,
) -> train_step.TrainState:
  """The state with which the epoch after `record`'s begins."""
  objective = record[metrics.monitored(record, "objective")]
  rate_state = experiment.learning_rate.after_epoch(state.rate_state, objective)
  return state.replace(
    rate_state=jax.device_put(rate_state, mesh_lib.replicated(mesh))
  )


@contextlib.contextmanager
def _explain_interruption(
  workdir: pathlib.Path,
  checkpoints: checkpoint.Checkpoints,
  signals: interruption.StopSignals,
) -> Iterator[None]:
  """A signal to stop ends in a line that says where the run stands."""
  signals.say_on_exit(
    lambda: (
      f"stopped at once; what was saved in {workdir} is good, and the same"
      " command goes on from it."
    )
  )
  try:
    yield
  except interruption.Stopped as stopped:
    step = max(checkpoints.steps(), default=0)
    raise errors.Interrupted(
      f"stopped by {stopped}; saved up to step {step} in {workdir}. The same"
      " command goes on from there.",
      stopped.number,
    ) from None
