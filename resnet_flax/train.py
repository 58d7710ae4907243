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
  workdir as workdir_lib,
)

_logger = logging.getLogger(__name__)

CompiledStep = Callable[
  ..., tuple[train_step.TrainState, train_step.StepMetrics]
]


def train_and_evaluate(
  config: ConfigDict,
  workdir: pathlib.Path,
  *,
  devices: Sequence[jax.Device] | None = None,
) -> list[metrics.Record]:
  """Trains as the configuration says; goes on with what the workdir holds.

  Args:
    config: every key of `configs/base.py`.
    workdir: gets config.json, environment.json, metrics.jsonl, checkpoints/
      and tensorboard/. If it holds an unfinished run of this configuration,
      the run goes on from its latest epoch.
    devices: what to train on, by default all devices.

  Returns:
    The records of all epochs, as in metrics.jsonl.

  Raises:
    ConfigError: a value that cannot be used; before anything is compiled.
    WorkdirError: the workdir cannot be used, or no longer be written.
    DataError: the data cannot be had.
    NonFiniteError: the loss or the state became infinite or NaN.
    Interrupted: Ctrl-C, once the workdir is open.
  """
  mesh = mesh_lib.create_mesh(devices)
  config_rules.check(config, num_devices=mesh.size)
  workdir = pathlib.Path(workdir).absolute()
  workdir_lib.check(workdir, config)
  experiment = experiment_lib.build(config)
  steps_per_epoch = experiment.learning_rate.steps_per_epoch

  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir))
    log = metrics.MetricsLog(workdir)
    saved_step = checkpoints.latest_step() or 0
    records = log.truncate(saved_step // steps_per_epoch)
    if len(records) == config.num_epochs:
      _logger.info("%s is finished: %d epochs.", workdir, len(records))
      return records
    stack.enter_context(_explain_interruption(config, workdir, records))

    dataset = datasets.load(config.dataset)
    with workdir_lib.explain_write_errors(workdir):
      workdir_lib.record_start(
        workdir, config, list(mesh.devices.flat), dataset.source
      )
      board = metrics.TensorBoard(workdir, saved_step, config.log.tensorboard)
    stack.callback(board.close)
    if dataset.validation is None:
      _logger.info(
        "note: the best epoch is chosen on the test split, as in the recipe;"
        " set dataset.validation_examples to hold out a part of training"
      )
    state = initial_state(config, experiment, dataset.train, mesh)
    if saved_step:
      state = checkpoints.restore(saved_step, state, mesh)
      _logger.info("going on after epoch %d of %s", len(records), workdir)
    progress = progress_lib.Progress(
      config.num_epochs,
      steps_per_epoch,
      config.batch_size,
      config.log.interval_seconds,
    )
    stack.callback(progress.close)
    key = jax.device_put(
      randomness.device_key(config.seed, randomness.Purpose.AUGMENTATION),
      mesh_lib.replicated(mesh),
    )
    compiled_step = compile_train_step(
      experiment, state, config.batch_size, key, mesh
    )
    eval_step = evaluate.jit_eval_step(experiment)
    splits = {"val": dataset.validation, "test": dataset.test}

    # From here on a Ctrl-C waits for the end of a step, and what is being
    # saved is finished before the loop is left.
    watch = stack.enter_context(interruption.InterruptWatch())
    stack.enter_context(workdir_lib.explain_write_errors(workdir))
    stack.callback(checkpoints.wait)

    def on_step(step_metrics: train_step.StepMetrics) -> None:
      progress.step(step_metrics)
      watch.check()

    for epoch in range(len(records), config.num_epochs):
      progress.start_epoch(epoch)
      started = time.perf_counter()
      batches = epoch_batches(
        dataset.train, config.batch_size, config.seed, epoch, mesh
      )
      state, last = train_epoch(compiled_step, state, batches, key, on_step)
      trained = time.perf_counter()
      progress.close()
      scores = {
        name: evaluate.evaluate(
          eval_step,
          state,
          split,
          config.eval_batch_size,
          mesh,
          on_batch=watch.check,
        )
        for name, split in splits.items()
        if split is not None
      }
      record = _record(epoch, int(state.step), last, trained - started, scores)
      monitored = scores.get("val", scores["test"])
      rate_state = experiment.learning_rate.after_epoch(
        state.rate_state, monitored["objective"]
      )
      state = state.replace(
        rate_state=jax.device_put(rate_state, mesh_lib.replicated(mesh))
      )
      # The record first: a checkpoint without its record could not go on, a
      # record without its checkpoint is cut off.
      log.append(record)
      checkpoints.save(state, epoch=epoch, accuracy=monitored["accuracy"])
      records.append(record)
      board.write(record)
      progress.end_epoch(record, time.perf_counter() - trained)
      watch.check()
  return records


def initial_state(
  config: ConfigDict,
  experiment: train_step.Experiment,
  train: datasets.Split,
  mesh: Mesh,
) -> train_step.TrainState:
  """The state before the first step, a copy on every device of the mesh."""
  create = jax.jit(
    functools.partial(train_step.create_train_state, experiment),
    out_shardings=mesh_lib.replicated(mesh),
  )
  key = randomness.device_key(config.seed, randomness.Purpose.INITIALIZATION)
  return create(key, normalization.measure(config.normalization, train))


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


def epoch_batches(
  split: datasets.Split, batch_size: int, seed: int, epoch: int, mesh: Mesh
) -> Iterator[tuple[jax.Array, jax.Array]]:
  """The batches of one epoch, in an order that (seed, epoch) decides.

  A last, smaller batch is dropped.

  Args:
    split: what is trained on.
    batch_size: images of a batch, over all devices.
    seed: the experiment's.
    epoch: 0-based.
    mesh: the devices that share a batch.

  Yields:
    (uint8[B, H, W, C], int32[B]), sharded over the mesh.
  """
  rng = randomness.host_rng(seed, randomness.Purpose.EPOCH_ORDER, epoch)
  order = rng.permutation(len(split))
  for start in range(0, len(split) - batch_size + 1, batch_size):
    batch = split.take(order[start : start + batch_size])
    yield mesh_lib.shard_batch(mesh, *batch)


def train_epoch(
  compiled_step: CompiledStep,
  state: train_step.TrainState,
  batches: Iterable[tuple[jax.Array, jax.Array]],
  key: jax.Array,
  on_step: Callable[[train_step.StepMetrics], Any],
) -> tuple[train_step.TrainState, train_step.StepMetrics]:
  """Takes one step for each batch.

  Args:
    compiled_step: from `compile_train_step`.
    state: before the first step; donated.
    batches: (images, labels) pairs, at least one.
    key: key[], the augmentation's.
    on_step: called with the metrics of every step, on the host.

  Returns:
    The new state and the metrics of the last step, on the host.

  Raises:
    NonFiniteError: a step's objective or the state after it is not finite.
  """
  pending = None
  steps_done = int(state.step)
  for images, labels in batches:
    state, step_metrics = compiled_step(state, images, labels, key)
    # Read one step late: the devices have the next step to work on meanwhile.
    if pending is not None:
      on_step(_read(pending, steps_done))
      steps_done += 1
    pending = step_metrics
  assert pending is not None  # `config_rules` leaves no empty epoch.
  last = _read(pending, steps_done)
  on_step(last)
  return state, last


def _read(
  step_metrics: train_step.StepMetrics, step: int
) -> train_step.StepMetrics:
  step_metrics = jax.device_get(step_metrics)
  if not step_metrics.finite:
    raise errors.NonFiniteError(
      f"the loss or the state is not finite after step {step} (0-based), at"
      f" learning rate {step_metrics.learning_rate:g}. Nothing of it was"
      " saved. Lower optimizer.learning_rate, or warm up with"
      " schedule.warmup_learning_rate."
    )
  return step_metrics


def _record(
  epoch: int,
  step: int,
  last: train_step.StepMetrics,
  seconds: float,
  scores: dict[str, dict[str, float]],
) -> metrics.Record:
  sums = last.sums
  for name, score in scores.items():
    if not math.isfinite(score["loss"]):
      raise errors.NonFiniteError(
        f"the {name} loss is {score['loss']} after step {step - 1} (0-based),"
        f" at learning rate {last.learning_rate:g}. Nothing of this epoch was"
        " saved. Lower optimizer.learning_rate or model.batch_norm_momentum."
      )
  record = {
    "epoch": epoch,
    "step": step,
    "learning_rate": float(last.learning_rate),
    "train_loss": float(sums.loss / sums.count),
    "train_objective": float(sums.objective / sums.count),
    "train_accuracy": float(sums.correct / sums.count),
  }
  for name, score in scores.items():
    record[f"{name}_loss"] = float(score["loss"])
    record[f"{name}_accuracy"] = float(score["accuracy"])
  record["epoch_seconds"] = seconds
  record["images_per_second"] = int(sums.count) / seconds
  return record


@contextlib.contextmanager
def _explain_interruption(
  config: ConfigDict, workdir: pathlib.Path, records: list[metrics.Record]
) -> Iterator[None]:
  """Ctrl-C says where the run stands; `records` grows as epochs are saved."""
  try:
    yield
  except KeyboardInterrupt:
    raise errors.Interrupted(
      f"interrupted; {len(records)} of {config.num_epochs} epochs are saved in"
      f" {workdir}. The same command goes on after them."
    ) from None
