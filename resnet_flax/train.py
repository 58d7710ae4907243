"""The loop: everything that reads, writes or waits happens here."""

import contextlib
import functools
import itertools
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_flax import (
  data as datasets,
  experiment as experiment_lib,
  step as train_step,
)
from resnet_flax.data import normalize as normalization, randomness
from resnet_flax.parallel import (
  calls as calls_lib,
  epochs,
  evaluate,
  hosts as distributed,
  networks as seeds_lib,
  resident,
)
from resnet_flax.run import (
  checkpoint,
  config as config_rules,
  errors,
  folder as workdir_lib,
  layer_norms,
  metrics,
  progress as progress_lib,
  signals as signals_lib,
  transfer,
)

_logger = logging.getLogger(__name__)

# What a checkpoint's notes are before the first step of an epoch.
NEW_EPOCH: checkpoint.Notes = {"learning_rate": [], "epoch_seconds": 0.0}

# Steps by which ways to train several seeds are compared.
_WARM_UP_STEPS, _TIMED_STEPS = 3, 20


def train_and_evaluate(
  config: ConfigDict,
  workdir: pathlib.Path,
  *,
  devices: Sequence[jax.Device] | None = None,
  signals: signals_lib.StopSignals | None = None,
) -> list[metrics.Record]:
  """Trains as the configuration says; goes on with what the workdir holds.

  On several hosts it is called in all processes; only process 0 reads and
  writes the workdir.

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
  devices = list(devices or jax.devices())
  config_rules.check(config, num_devices=len(devices))
  config_rules.check_labels(config)
  distributed.check_same("the configuration", _shared_keys(config))
  workdir = pathlib.Path(workdir).absolute()
  experiment = experiment_lib.build(config)
  steps_per_epoch = experiment.learning_rate.steps_per_epoch
  records: list[metrics.Record] = []

  def best_steps() -> set[int]:
    best = metrics.best_records(records, config.checkpoint.monitor)
    return {record["step"] for record in best}

  with contextlib.ExitStack() as stack:
    signals = stack.enter_context(signals or signals_lib.StopSignals())
    checkpoints: checkpoint.Checkpoints | checkpoint.Elsewhere
    checkpoints = checkpoint.Elsewhere()
    log: metrics.MetricsLog | metrics.LogElsewhere = metrics.LogElsewhere()
    restored: Any = None

    def open_run() -> tuple[bool, int, checkpoint.Notes, list[metrics.Record]]:
      nonlocal checkpoints, log, restored
      with workdir_lib.explain_write_errors(workdir):
        stack.enter_context(workdir_lib.use(workdir, config))
        opened = stack.enter_context(
          checkpoint.Checkpoints(workdir, best_steps=best_steps)
        )
        checkpoints = opened
        stack.enter_context(_explain_interruption(workdir, opened, signals))
        notes = NEW_EPOCH
        # Tracing a deep network takes long: not for a run that is new.
        if opened.steps():
          like = experiment_lib.abstract_state(config, experiment)
          restored, notes = opened.restore_latest(like) or (None, NEW_EPOCH)
        step = int(np.ravel(restored.step)[0]) if restored else 0
        log = metrics.MetricsLog(workdir)
        kept = log.cut_back(
          step, steps_per_epoch, fallen_back=opened.has_fallen_back(step)
        )
      return restored is not None, step, notes, kept

    goes_on, step, notes, kept = distributed.first(open_run)
    records += kept
    if isinstance(checkpoints, checkpoint.Elsewhere):
      checkpoints = checkpoint.Elsewhere([step] if goes_on else [])
      stack.enter_context(_explain_interruption(workdir, checkpoints, signals))
    if len(records) == config.num_epochs:
      _logger.info("%s is finished: %d epochs.", workdir, len(records))
      return records

    # What is wrong with it is said before the data is prepared.
    source = None
    if config.init_from and not goes_on:
      source = distributed.first_only(lambda: transfer.load(config))
    dataset = distributed.first_then_others(
      lambda: datasets.load(config.dataset, config.augment.name)
    )
    distributed.check_same("the data", dataset.source)
    execution = _choose_execution(
      config, workdir, experiment, dataset.train, devices
    )
    layout = seeds_lib.Layout.create(config, devices, execution)
    # As chosen, now or when the run began.
    steps_per_call = _steps_per_call(
      config.steps_per_call or _stored(workdir, "steps_per_call") or 0,
      config,
      experiment,
      dataset.train,
      layout,
    )
    chosen = {"seed_execution": execution, "steps_per_call": steps_per_call}

    def record_start() -> None:
      with workdir_lib.explain_write_errors(workdir):
        workdir_lib.record_start(
          workdir,
          ConfigDict(config.to_dict() | chosen),
          devices,
          dataset.source,
        )

    distributed.first(record_start)
    if dataset.validation is None:
      _logger.info(
        "note: the best epoch is chosen on the test split, as in the recipe;"
        " set dataset.validation_examples to hold out a part of training"
      )
    if goes_on:
      _logger.info("going on after step %d of %s", step, workdir)
      stacked = distributed.from_first(
        lambda: restored,
        lambda: experiment_lib.abstract_state(config, experiment),
      )
      state = layout.put(seeds_lib.unstack(stacked, config.num_seeds))
      # The devices have them now.
      del stacked, restored
    else:
      state = initial_state(config, experiment, dataset.train, layout, source)
    if records and step == len(records) * steps_per_epoch:
      # An epoch's checkpoint is from before its evaluation.
      state = _after_epoch(state, records[-1], experiment, layout)
      notes = NEW_EPOCH
    progress = progress_lib.Progress(
      config.num_epochs,
      steps_per_epoch,
      config.batch_size,
      config.log.interval_seconds,
      bar=distributed.is_first(),
    )
    stack.callback(progress.close)
    key = augmentation_key(layout)
    compiled_step, epoch_calls = calls_lib.compile_calls(
      config, experiment, state, dataset.train, key, layout, steps_per_call
    )
    write_layer_norms = _layer_norms_writer(
      config, experiment, state, key, layout
    )
    eval_step = evaluate.jit_eval_step(experiment, layout)
    splits = {"val": dataset.validation, "test": dataset.test}

    # From here on a signal waits for the end of a step, and what is being
    # saved is finished before the loop is left.
    stack.enter_context(signals.hold())
    stack.enter_context(workdir_lib.explain_write_errors(workdir, running=True))
    board = stack.enter_context(
      metrics.TensorBoard(
        workdir,
        int(state.step),
        config.log.tensorboard and distributed.is_first(),
      )
    )
    if records and records[-1]["step"] == int(state.step):
      # Superseded, or not written when the run was killed.
      board.write(records[-1])
    stack.callback(checkpoints.wait)
    if config.init_from and not goes_on:
      # So that the run depends no longer on what becomes of its source.
      checkpoints.save(seeds_lib.stack(layout.get(state)), notes)
      del source
    timer = signals_lib.Timer(
      config.checkpoint.every_steps, config.checkpoint.every_minutes
    )
    agreement = distributed.agreement(signals, timer, devices)

    while len(records) < config.num_epochs:
      epoch = len(records)
      first_step = epoch * steps_per_epoch
      taken = int(state.step) - first_step
      progress.start_epoch(epoch, taken)
      calls = epoch_calls(epoch, taken)
      started = time.perf_counter()
      while taken < steps_per_epoch:
        try:
          state, last = calls_lib.train_steps(
            compiled_step,
            state,
            calls,
            progress.step,
            until=agreement.until,
            before_call=functools.partial(write_layer_norms, board),
            layout=layout,
          )
        except errors.NonFiniteError as error:
          describe = functools.partial(
            _describe_failure,
            *(workdir, config, dataset.train, error, checkpoints),
          )
          path = distributed.first(describe)
          raise errors.NonFiniteError(
            f"{error} What reproduces the step is in {path}.",
            error.step,
            error.seed,
          ) from error
        taken = int(state.step) - first_step
        now = time.perf_counter()
        notes = {
          # Of each seed.
          "learning_rate": [float(each.learning_rate) for each in last],
          "epoch_seconds": notes["epoch_seconds"] + now - started,
        }
        started = now
        distributed.first(lambda: workdir_lib.check_not_removed(workdir))
        checkpoints.save(seeds_lib.stack(layout.get(state)), notes)
        timer.reset()
        agreement.check()
      progress.close()

      started = time.perf_counter()
      scores = {
        name: evaluate.evaluate(
          eval_step,
          state,
          split,
          config.eval_batch_size,
          layout,
          on_batch=agreement.on_batch,
        )
        for name, split in splits.items()
        if split is not None
      }
      record = _record(epoch, state, notes, scores, layout)
      distributed.first(lambda: workdir_lib.check_not_removed(workdir))
      # After its checkpoint was started: a record without its checkpoint is
      # cut off, a checkpoint without its record is evaluated again.
      log.append(record)
      records.append(record)
      state = _after_epoch(state, record, experiment, layout)
      notes = NEW_EPOCH
      board.write(record)
      progress.end_epoch(record, time.perf_counter() - started)
  return records


def _shared_keys(config: ConfigDict) -> metrics.Record:
  """The keys that all processes must agree on: all but where data is."""
  own = ("dataset.data_dir", "dataset.archive", "dataset.cache_dir")
  flat = config_rules.to_flat(config)
  return {key: value for key, value in flat.items() if key not in own}


def _stored(workdir: pathlib.Path, key: str) -> Any:
  """What an earlier start of the run has chosen; None without one."""

  def read() -> Any:
    if not (workdir / "config.json").exists():
      return None
    return workdir_lib.load_config(workdir).get(key)

  return distributed.first(read)


def _steps_per_call(
  wanted: int,
  config: ConfigDict,
  experiment: train_step.Experiment,
  split: datasets.Split,
  layout: seeds_lib.Layout,
) -> int:
  size = max(config.model.input_size, *experiment.image_shape[:2])
  # By one process for all: their devices' memory may differ.
  return distributed.first(
    lambda: resident.steps_per_call(wanted, split, layout, size)
  )


def _choose_execution(
  config: ConfigDict,
  workdir: pathlib.Path,
  experiment: train_step.Experiment,
  split: datasets.Split,
  devices: Sequence[jax.Device],
) -> str:
  """How several seeds are trained; once for all starts of a run."""
  if config.seed_execution != "auto" or config.num_seeds == 1:
    return config.seed_execution
  stored = _stored(workdir, "seed_execution")
  if stored in seeds_lib.EXECUTIONS:
    return stored
  per_call = {
    seeds_lib.Layout.create(config, devices, execution).per_call
    for execution in seeds_lib.EXECUTIONS
  }
  on_cpu = devices[0].platform == "cpu"
  # On CPUs as experiments/seeds measured it.
  if on_cpu or len(per_call) == 1:
    return "in_turn"
  execution = faster_execution(config, experiment, split, devices)
  return distributed.first(lambda: execution)


def faster_execution(
  config: ConfigDict,
  experiment: train_step.Experiment,
  split: datasets.Split,
  devices: Sequence[jax.Device] | None = None,
) -> str:
  """How a few steps of several seeds are faster on these devices.

  Args:
    config: the experiment's.
    experiment: the fixed parts.
    split: what is trained on.
    devices: by default all devices.

  Returns:
    'vectorized' or 'in_turn'.
  """
  seconds = {
    execution: _seconds_per_step(
      config,
      experiment,
      split,
      seeds_lib.Layout.create(config, devices, execution),
    )
    for execution in seeds_lib.EXECUTIONS
  }
  _logger.info(
    "%d seeds take %.4f s a step in turn, %.4f s vectorized",
    config.num_seeds,
    *(seconds[execution] for execution in seeds_lib.EXECUTIONS),
  )
  return min(seeds_lib.EXECUTIONS, key=lambda execution: seconds[execution])


def _seconds_per_step(
  config: ConfigDict,
  experiment: train_step.Experiment,
  split: datasets.Split,
  layout: seeds_lib.Layout,
) -> float:
  """Of some steps, called as training will call them."""
  state = initial_state(config, experiment, split, layout)
  key = augmentation_key(layout)
  steps_per_call = _steps_per_call(
    config.steps_per_call, config, experiment, split, layout
  )
  compiled_step, epoch_calls = calls_lib.compile_calls(
    config, experiment, state, split, key, layout, steps_per_call
  )
  calls = itertools.chain.from_iterable(
    epoch_calls(epoch, 0) for epoch in itertools.count()
  )
  for count in (_WARM_UP_STEPS, _TIMED_STEPS):
    done = 0
    started = time.perf_counter()
    while done < count:
      call = next(calls)
      state, _ = compiled_step(state, *call.arguments)
      done += call.num_steps
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - started) / done
  return seconds


def initial_state(
  config: ConfigDict,
  experiment: train_step.Experiment,
  train: datasets.Split,
  layout: seeds_lib.Layout,
  source: Mapping[str, Any] | None = None,
) -> calls_lib.State:
  """The state of all seeds before the first step.

  Args:
    config: the experiment's.
    experiment: the fixed parts.
    train: what the normalization is measured on.
    layout: where the networks are.
    source: from `transfer.load`, to start from instead of random weights.
  """
  scale = normalization.measure(config.normalization, train)

  def create() -> list[train_step.TrainState]:
    states = []
    for seed in layout.seeds:
      key = randomness.device_key(seed, randomness.Purpose.INITIALIZATION)
      state = train_step.create_train_state(experiment, key, scale)
      if source is not None:
        state = transfer.initialize(state, source)
      states.append(state)
    return states

  return layout.put(
    distributed.from_first(create, lambda: jax.eval_shape(create))
  )


def augmentation_key(layout: seeds_lib.Layout) -> Any:
  """The key[] of each seed, which all of its training steps take."""
  return layout.put(
    [
      randomness.device_key(seed, randomness.Purpose.AUGMENTATION)
      for seed in layout.seeds
    ]
  )


def _layer_norms_writer(
  config: ConfigDict,
  experiment: train_step.Experiment,
  state: calls_lib.State,
  key: Any,
  layout: seeds_lib.Layout,
) -> Callable[
  [metrics.TensorBoard, int, calls_lib.State, calls_lib.Call], None
]:
  """What writes the layers' norms where `log_layer_norms_every` says.

  Args:
    config: the experiment's.
    experiment: the fixed parts.
    state: of all seeds; only its shapes are used.
    key: from `augmentation_key`.
    layout: where the networks are.

  Returns:
    A function of a board and of what `calls.BeforeCall` takes.
  """
  every = config.log_layer_norms_every
  if not every:
    return lambda board, step, state, call: None
  names = layer_norms.layer_names(experiment)
  measure = calls_lib.compile_step(
    layer_norms.measure,
    experiment,
    state,
    config.batch_size,
    key,
    layout,
    title="measurement of layer norms",
    donate_state=False,
  )

  def write(board, step, state, call):
    if step % every:
      return
    norms = layout.get(measure(state, *call.first_batch(), key))
    for seed, of_seed in zip(layout.seeds, norms, strict=True):
      values = layer_norms.scalars(names, of_seed)
      if len(layout.seeds) > 1:
        values = {metrics.seed_tag(seed, tag): v for tag, v in values.items()}
      board.write_scalars(step, values)

  return write


def _describe_failure(
  workdir: pathlib.Path,
  config: ConfigDict,
  split: datasets.Split,
  error: errors.NonFiniteError,
  checkpoints: checkpoint.Checkpoints | checkpoint.Elsewhere,
) -> str:
  """Writes what leads to a step that failed, from the checkpoint before it."""
  checkpoints.wait()
  step, seed = error.step, error.seed
  order = functools.partial(epochs.order, len(split), config.batch_size, seed)
  key = randomness.device_key(seed, randomness.Purpose.AUGMENTATION)
  epoch, within = divmod(step, len(split) // config.batch_size)
  path = workdir / "nonfinite_step.json"
  workdir_lib.write_json(
    path,
    {
      "seed": seed,
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
  return str(path)


def _record(
  epoch: int,
  state: calls_lib.State,
  notes: checkpoint.Notes,
  scores: Mapping[str, evaluate.Scores],
  layout: seeds_lib.Layout,
) -> metrics.Record:
  step = int(state.step)
  of_seeds = []
  epoch_sums = layout.get(layout.each(lambda one: one.epoch_sums, state))
  for place, (seed, sums) in enumerate(
    zip(layout.seeds, epoch_sums, strict=True)
  ):
    rate = notes["learning_rate"][place]
    values = {
      "learning_rate": rate,
      "train_loss": float(sums.loss / sums.count),
      "train_objective": float(sums.objective / sums.count),
      "train_accuracy": float(sums.correct / sums.count),
    }
    for split, score in scores.items():
      loss = score.networks[place]["loss"]
      if not math.isfinite(loss):
        raise errors.NonFiniteError(
          f"the {split} loss{layout.of_seed(seed)} is {loss} after step"
          f" {step - 1} (0-based), at learning rate {rate:g}. Lower"
          " optimizer.learning_rate or model.batch_norm_momentum.",
          step - 1,
          seed,
        )
      for metric in ("loss", "objective", "accuracy"):
        values[f"{split}_{metric}"] = float(score.networks[place][metric])
    of_seeds.append(values)
  num_images = len(of_seeds) * int(sums.count)
  seconds = notes["epoch_seconds"]
  timed = {
    "epoch_seconds": seconds,
    "images_per_second": num_images / seconds,
  }
  ensembles = {
    f"{split}_ensemble_{metric}": float(value)
    for split, score in scores.items()
    for metric, value in (score.ensemble or {}).items()
  }
  first = {"epoch": epoch, "step": step}
  return metrics.summarize(first, layout.seeds, of_seeds, ensembles) | timed


def _after_epoch(
  state: calls_lib.State,
  record: metrics.Record,
  experiment: train_step.Experiment,
  layout: seeds_lib.Layout,
) -> calls_lib.State:
  """The state with which the epoch after `record`'s begins."""
  objective = metrics.monitored(record, "objective")
  before = layout.get(layout.each(lambda one: one.rate_state, state))
  after = [
    experiment.learning_rate.after_epoch(rate_state, of_seed[objective])
    for rate_state, of_seed in zip(
      before, metrics.of_seeds(record), strict=True
    )
  ]
  return layout.each(
    lambda one, rate_state: one.replace(rate_state=rate_state),
    state,
    layout.put(after),
  )


@contextlib.contextmanager
def _explain_interruption(
  workdir: pathlib.Path,
  checkpoints: checkpoint.Checkpoints | checkpoint.Elsewhere,
  signals: signals_lib.StopSignals,
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
  except signals_lib.Stopped as stopped:
    step = max(checkpoints.steps(), default=0)
    raise errors.Interrupted(
      f"stopped by {stopped}; saved up to step {step} in {workdir}. The same"
      " command goes on from there.",
      stopped.number,
    ) from None
