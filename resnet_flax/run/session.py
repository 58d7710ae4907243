"""One start of a run: its folder, checkpoints, logs, signals and hosts.

On several hosts only process 0 reads and writes the workdir. In the other
processes the same calls touch no files; they only agree with process 0.
"""

import contextlib
import functools
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from resnet_flax import step as step_lib
from resnet_flax.data import dataset as dataset_lib, randomness, types
from resnet_flax.models.kernels import onednn
from resnet_flax.parallel import hosts, many_steps, networks, program
from resnet_flax.run import (
  checkpoint,
  errors,
  experiment as experiment_lib,
  files as files_lib,
  folder,
  keys,
  metrics,
  mirror,
  progress,
  signals as signals_lib,
)

_logger = logging.getLogger(__name__)

# Paths of data may differ between hosts; all other keys must be equal.
_HOST_KEYS = ("dataset.data_dir", "dataset.archive", "dataset.cache_dir")


class Session:
  """The files, signals and progress of a run, for the loop; see `open_run`.

  `records` are as in metrics.jsonl, `step` counts the steps done, and `notes`
  describe the epoch up to its latest save; see `checkpoint.NEW_EPOCH`.
  """

  def __init__(
    self,
    config: ConfigDict,
    workdir: pathlib.Path,
    devices: Sequence[jax.Device],
    experiment: step_lib.Experiment,
    signals: signals_lib.StopSignals,
    on_event: Callable[[str], None],
    stack: contextlib.ExitStack,
  ):
    self.on_event = on_event
    self._config, self._workdir, self._devices = config, workdir, devices
    self._experiment, self._signals, self._stack = experiment, signals, stack
    self._steps_per_epoch = experiment.learning_rate.steps_per_epoch
    self._pending: networks.Networks | None = None
    self._log = metrics.MetricsLog(workdir, config)
    # Only process 0 sets these three.
    self._checkpoints: checkpoint.Checkpoints | None = None
    self._board: metrics.TensorBoard | None = None
    self._restored: Any = None

    self.resumes, self.step, self.notes, self.records = hosts.on_first(
      self._open
    )
    self._saved_step = self.step
    if self._checkpoints is None:
      stack.enter_context(self._explain_interruption())
    self.is_finished = len(self.records) == config.num_epochs

  # ---- Opening

  def _open(self) -> tuple[bool, int, checkpoint.Notes, list[metrics.Record]]:
    """Opens the workdir; returns `resumes`, `step`, `notes` and `records`."""
    with folder.explain_write_errors(self._workdir):
      self._stack.enter_context(folder.use(self._workdir, self._config))
      is_taken = functools.partial(folder.is_taken, self._workdir)
      if address := self._config.checkpoint.mirror:
        check = functools.partial(
          folder.check_same, config=self._config, mirror=address
        )
        self._stack.enter_context(
          mirror.Mirror(address, self._workdir, check, is_taken)
        )
      self._checkpoints = self._stack.enter_context(
        checkpoint.Checkpoints(
          self._workdir,
          best_steps=self._best_steps,
          on_event=self._on_save,
          is_taken=is_taken,
        )
      )
      self._saved_step = max(checkpoint.steps(self._workdir), default=0)
      self._stack.enter_context(self._explain_interruption())
      # Checked first: the errors below would not say that the data differs.
      if facts := folder.read_facts(self._workdir):
        info = dataset_lib.info(self._config.dataset)
        describe = "{} classes, {} and {} images".format
        configured = describe(info.num_classes, info.num_train, info.num_test)
        stored = describe(len(facts[0]), *facts[1:])
        folder.check_data(self._workdir, configured, stored)
      notes, step = checkpoint.NEW_EPOCH, 0
      # Not for a new run, since tracing a deep network takes long.
      if checkpoint.steps(self._workdir):
        like = experiment_lib.abstract_state(self._config, self._experiment)
        self._restored, notes = self._checkpoints.restore_latest(like)
        step = int(np.ravel(self._restored.step)[0])
      fallen_back = self._checkpoints.has_fallen_back(step)
      records = self._log.drop_after(
        step, self._steps_per_epoch, fallen_back=fallen_back
      )
    return self._restored is not None, step, notes, records

  def _on_save(self, event: str) -> None:
    """Reports an event of a save; fails if the workdir was removed."""
    self.on_event(event)
    folder.check_not_removed(self._workdir)

  def _best_steps(self) -> set[int]:
    best = metrics.best_records(self.records, self._config.checkpoint.monitor)
    return {record["step"] for record in best}

  @contextlib.contextmanager
  def _explain_interruption(self) -> Iterator[None]:
    """Makes a signal to stop end in one line that says what is saved."""

    def saved(what: str, step: int) -> str:
      if not step:
        return f"{self._workdir} has no saved step: the command starts again."
      return f"{what} in {self._workdir}. The same command resumes from there."

    def on_disk() -> int:
      """The latest complete checkpoint's step: a save in progress is lost."""
      with contextlib.suppress(OSError):  # The disk may be missing.
        if self._checkpoints is not None:
          return max(checkpoint.steps(self._workdir), default=0)
      return self._saved_step

    self._signals.exit_message = lambda: (
      f"stopped at once; {saved('good checkpoints are', on_disk())}"
    )
    try:
      yield
    except signals_lib.Stopped as stopped:
      step = self._saved_step
      raise errors.Interrupted(
        f"stopped by {stopped}; {saved(f'saved up to step {step}', step)}",
        stopped.number,
      ) from None

  def choose_and_record(
    self, dataset: types.Dataset
  ) -> tuple[networks.Layout, int]:
    """Chooses the layout of the networks and the training steps per call.

    Writes environment.json and, for a new run, config.json with these choices.
    """
    config, devices = self._config, self._devices
    on_cpu = devices[0].platform == "cpu"
    dtype = jnp.dtype(config.model.dtype)
    if on_cpu and dtype != jnp.float32 and not onednn.can_convolve(dtype):
      _logger.info("note: %s is slow on this CPU; float32 is faster", dtype)
    execution = config.seed_execution
    if execution == "auto" and config.num_seeds > 1:
      # CPUs are faster in turn (experiments/seeds); on accelerators, several
      # networks in one call wait less for the host.
      execution = "in_turn" if on_cpu else "vectorized"
    layout = networks.Layout.create(config, devices, execution)
    wanted_steps = config.steps_per_call
    side = max(config.model.input_size, *self._experiment.image_shape[:2])
    # Process 0 chooses for all: the memory of their devices may differ.
    steps_per_call = hosts.on_first(
      lambda: many_steps.choose(wanted_steps, dataset.train, layout, side)
    )
    self._layout, self._split = layout, dataset.train
    chosen = {"seed_execution": execution, "steps_per_call": steps_per_call}
    hosts.on_first(lambda: self._record_start(dataset, chosen))
    return layout, steps_per_call

  def _record_start(
    self, dataset: types.Dataset, chosen: dict[str, Any]
  ) -> None:
    config = ConfigDict(self._config.to_dict() | chosen)
    info = dataset_lib.info(config.dataset)
    counts = {"train": info.num_train, "test": info.num_test}
    facts = {"class_names": dataset.class_names, **counts}
    with folder.explain_write_errors(self._workdir):
      folder.record_start(
        self._workdir, config, self._devices, dataset.source, facts
      )

  def restored_states(self) -> list[step_lib.TrainState]:
    """The restored state of each seed, in all processes."""
    _logger.info("resuming after step %d of %s", self.step, self._workdir)
    restored, self._restored = self._restored, None
    stacked = hosts.from_first(
      lambda: restored,
      lambda: experiment_lib.abstract_state(self._config, self._experiment),
    )
    return networks.unstack(stacked, self._config.num_seeds)

  # ---- Training

  def start(self, state: networks.Networks) -> None:
    """Begins training: from now on a signal waits for the call in progress."""
    config = self._config
    self._stack.enter_context(self._signals.hold())
    self._stack.enter_context(
      folder.explain_write_errors(self._workdir, running=True)
    )
    if hosts.is_first() and config.log.tensorboard:
      self._board = self._stack.enter_context(
        metrics.TensorBoard(self._workdir, self.step)
      )
      if self.records and self.records[-1]["step"] == self.step:
        # The restart supersedes this event, or a killed run did not write it.
        self._board.write(self.records[-1])
    if self._checkpoints is not None:
      self._stack.callback(self._checkpoints.wait)
    if config.init_from and not self.resumes:
      # From now on the run does not need the source of its first weights.
      self._save(state)
    self._last_save = time.monotonic()
    self._agreement = hosts.Agreement(
      self._signals, self._is_overdue, self._devices
    )
    self._progress = progress.Progress(config, self._steps_per_epoch)
    self._stack.callback(self._progress.close)

  def batches(
    self, epoch: int, of_epoch: Callable[[int, int], Iterator[program.Batch]]
  ) -> Iterator[program.Batch]:
    """Begins a 0-based epoch; yields its batches from the next step on."""
    first = self.step - epoch * self._steps_per_epoch
    if not first:
      self.notes = checkpoint.NEW_EPOCH
    self._progress.start_epoch(epoch, first)
    self._started = began = time.perf_counter()
    self._waited = 0.0
    for batch in of_epoch(epoch, first):
      self._waited += time.perf_counter() - began
      yield batch
      began = time.perf_counter()
    self._progress.close()
    self._started = time.perf_counter()  # Of the evaluation.

  def advance(self, step_metrics: networks.Networks, num_steps: int) -> None:
    """Keeps a call's `StepMetrics`; reads and checks the previous call's.

    Reading one call late lets the devices work on the next call meanwhile.
    """
    self.on_event("step")
    self._read()
    self._pending = step_metrics
    self.step += num_steps

  def _read(self) -> list[step_lib.StepMetrics]:
    """Reads the pending metrics of each seed; fails if one is not finite."""
    if self._pending is None:
      return []
    of_seeds = self._layout.get(self._pending)
    self._pending = None
    for seed, last in zip(self._layout.seeds, of_seeds, strict=True):
      if not last.finite:
        self._fail(int(last.step), seed, float(last.learning_rate))
    self._progress.step(of_seeds)
    return of_seeds

  def _fail(self, step: int, seed: int, rate: float) -> None:
    path = self._workdir / "nonfinite_step.json"

    def write() -> None:
      folder.check_not_removed(self._workdir)
      files_lib.write_json(path, self._reproduce(step, seed))

    hosts.on_first(write)
    raise errors.NonFiniteError(
      f"the loss or the state{self._layout.seed_suffix(seed)} is not finite"
      f" after step {step} (0-based), at learning rate {rate:g}. Start again"
      " in another --workdir with a lower optimizer.learning_rate or a longer"
      " schedule.linear_warmup_epochs (onecycle: peak_percent). To reproduce"
      f" the step, see {path}."
    )

  def _reproduce(self, step: int, seed: int) -> dict[str, Any]:
    """The batch and keys that repeat a seed's step from a checkpoint."""
    assert self._checkpoints is not None
    self._checkpoints.wait()
    epoch, step_in_epoch = divmod(step, self._steps_per_epoch)
    order = program.order(
      len(self._split), self._config.batch_size, seed, epoch
    )
    key = randomness.device_key(seed, randomness.Purpose.AUGMENTATION)
    return {
      "seed": seed,
      "step": step,
      "epoch": epoch,
      "step_in_epoch": step_in_epoch,
      # Positions in the whole official training split.
      "batch_indexes": self._split.indices[order[step_in_epoch]].tolist(),
      **{
        f"{name}_key": jax.random.key_data(key).tolist()
        for name, key in step_lib.step_keys(key, step).items()
      },
      "latest_checkpoint_step": max(
        checkpoint.steps(self._workdir), default=None
      ),
    }

  def should_save(self) -> bool:
    """Whether to save now: by the clock, steps, a signal, the epoch's end."""
    # All processes must vote after every call.
    wants_save = self._agreement.wants_save()
    every = self._config.checkpoint.every_steps
    is_due = every and self.step % every == 0
    epoch_end = (len(self.records) + 1) * self._steps_per_epoch
    return bool(wants_save or is_due or self.step == epoch_end)

  def _is_overdue(self) -> bool:
    seconds = 60 * self._config.checkpoint.every_minutes
    return 0 < seconds <= time.monotonic() - self._last_save

  def save(
    self,
    state: networks.Networks,
    before: Callable[[int, networks.Networks], networks.Networks],
  ) -> networks.Networks:
    """Applies `before` to the states, starts to save the result, returns it.

    Raises `Stopped` instead, once the save has started, if a signal has come.
    """
    of_seeds = self._read()
    now = time.perf_counter()
    self.notes = {
      "learning_rate": [float(last.learning_rate) for last in of_seeds],
      "epoch_seconds": self.notes["epoch_seconds"] + now - self._started,
      "data_seconds": self.notes["data_seconds"] + self._waited,
    }
    self._started, self._waited = now, 0.0
    state = before(self.step, state)
    self._save(state)
    self._last_save = time.monotonic()
    self._agreement.check()
    return state

  def _save(self, state: networks.Networks) -> None:
    self.on_event("save")
    hosts.on_first(lambda: folder.check_not_removed(self._workdir))
    stacked = networks.stack(self._layout.get(state))
    if self._checkpoints is not None:
      self._checkpoints.save(stacked, self.notes)
    self._saved_step = self.step

  def on_evaluation_batch(self) -> None:
    """Called for each batch of an evaluation; stops if a signal has come."""
    self.on_event("evaluate")
    self._agreement.check(at_once=False)

  def end_epoch(self, record: metrics.Record) -> None:
    """Records an epoch whose checkpoint is being saved.

    A killed run may have only one of the two. On resume, a record without its
    checkpoint is dropped; an epoch without its record is evaluated again.
    """
    self.on_event("record")
    record["evaluation_seconds"] = time.perf_counter() - self._started
    hosts.on_first(lambda: folder.check_not_removed(self._workdir))
    if hosts.is_first():
      self._log.append(record)
    self.records.append(record)
    if self._board is not None:
      self._board.write(record)
    self._progress.end_epoch(record)

  def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes numbers by their tags to TensorBoard, if the run logs to it."""
    if self._board is not None:
      self._board.write_scalars(step, values)


@contextlib.contextmanager
def open_run(
  config: ConfigDict,
  workdir: str | os.PathLike[str],
  devices: Sequence[jax.Device],
  experiment: step_lib.Experiment,
  *,
  signals: signals_lib.StopSignals | None = None,
  on_event: Callable[[str], None] = lambda name: None,
) -> Iterator[Session]:
  """Opens a run: locks its workdir and restores its latest checkpoint.

  A missing workdir is created. `signals` says how signals to stop are handled.
  `on_event` is called with 'save', 'manifest' and 'record' before each of them,
  and with 'step' and 'evaluate' after each call of a training or scoring step.
  """
  flat = keys.to_flat(config)
  hosts.check_same(
    "the configuration", {k: v for k, v in flat.items() if k not in _HOST_KEYS}
  )
  path = errors.local_path(workdir, "workdir").absolute()
  with contextlib.ExitStack() as stack:
    signals = stack.enter_context(signals or signals_lib.StopSignals())
    yield Session(config, path, devices, experiment, signals, on_event, stack)
