"""The training loop: it reads, writes and waits; the steps are pure."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from resnet_flax import data, step as step_lib
from resnet_flax.data import dataset as dataset_lib, normalize, randomness
from resnet_flax.parallel import (
  batch_statistics,
  evaluate,
  hosts,
  many_steps,
  networks,
  program,
)
from resnet_flax.run import (
  environment,
  errors,
  experiment as experiment_lib,
  layer_norms,
  load,
  metrics,
  records,
  rules,
  session,
  signals as signals_lib,
)

_logger = logging.getLogger(__name__)


def train_and_evaluate(
  config: ConfigDict,
  workdir: str | os.PathLike[str],
  *,
  devices: Sequence[jax.Device] | None = None,
  signals: signals_lib.StopSignals | None = None,
  on_event: Callable[[str], None] = lambda name: None,
) -> list[metrics.Record]:
  """Trains as the configuration says; resumes the workdir's run.

  The workdir gets config.json, environment.json, metrics.jsonl, checkpoints/
  and tensorboard/. If it holds an unfinished run of this configuration, the run
  resumes after the latest step that was saved, bit-identically. On several
  hosts all processes call this; only process 0 reads and writes the workdir.

  `devices` are all devices by default. `signals` handles Ctrl-C and other
  signals to stop. `on_event`, a hook for tests, is called with the name of an
  event: 'compile', or one that `session.open_run` lists.

  Returns the records of all epochs, as in metrics.jsonl.

  Raises:
    ConfigError: a configuration value or a JAX setting is wrong; raised before
      anything is compiled.
    WorkdirError: the workdir is in use, cannot be read or written, or holds a
      run of another configuration or on other data.
    DataError: the data is missing, damaged or incomplete.
    NonFiniteError: the loss or the state became infinite or NaN.
    Interrupted: a signal stopped the run; steps in progress were saved first.
  """
  devices = list(devices or jax.devices())
  rules.check(config, num_devices=len(devices))
  rules.check_num_classes(config)
  environment.check_jax()
  experiment = experiment_lib.build(config)
  with session.open_run(
    config, workdir, devices, experiment, signals=signals, on_event=on_event
  ) as run:
    if run.is_finished:
      path = errors.local_path(workdir, "workdir")
      hosts.on_first(lambda: load.check_local_data(config, path))
      _logger.info("%s is finished: %d epochs.", workdir, len(run.records))
      return run.records
    setup = _set_up(config, experiment, run)
    state, training, layout = setup.state, setup.training, setup.layout

    for epoch in range(len(run.records), config.num_epochs):
      for batch in run.batches(epoch, training.batches):
        setup.before_step(run.step, state, batch)
        state, step_metrics = training.step(state, batch)
        run.advance(step_metrics, batch.num_steps)  # Checks the previous call.
        if run.should_save():  # By clock, steps, signal or epoch's end.
          state = run.save(state, setup.before_save)
      scores = evaluate.evaluate_all(
        *(config, epoch, setup.eval_step, state, setup.splits, layout),
        on_batch=run.on_evaluation_batch,
      )
      record = records.of_epoch(epoch, state, run.notes, scores, layout)
      run.end_epoch(record)
      state = _after_epoch(state, record, experiment, layout)
  return run.records


# ---- Before the loop


class _Setup(NamedTuple):
  """What `_set_up` makes for the loop."""

  state: networks.Networks
  layout: networks.Layout
  training: program.Program
  eval_step: evaluate.EvalStep
  splits: dict[str, data.Split]  # The scored ones: 'val', 'test'.
  # Called with the steps done, the state and the batch.
  before_step: Callable[[int, networks.Networks, program.Batch], None]
  # Called with the steps done and the state; returns the state to save.
  before_save: Callable[[int, networks.Networks], networks.Networks]


def _set_up(
  config: ConfigDict, experiment: step_lib.Experiment, run: session.Session
) -> _Setup:
  """Loads the data, makes or restores the state, compiles the step."""
  # First, so that an error in the weights does not wait for the data.
  source = None
  if config.init_from and not run.resumes:
    source = hosts.on_first_only(lambda: load.load_source(config))
  dataset = hosts.on_first_then_others(
    lambda: dataset_lib.load(config.dataset, config.augment.name)
  )
  hosts.check_same("the data", {"source": dataset.source})
  steps_per_epoch = experiment.learning_rate.steps_per_epoch
  if len(dataset.train) // config.batch_size != steps_per_epoch:
    raise errors.DataError(
      f"{len(dataset.train)} training images are found; the number has changed"
      " since the command began. Start the run again once the data is complete."
    )
  if dataset.validation is None:
    _logger.info(
      "note: the best epoch is chosen on the test split, as in the recipe;"
      " set dataset.validation_examples to hold out a part of training"
    )
  layout, steps_per_call = run.choose_and_record(dataset)

  # The restored or initial state.
  if run.resumes:
    state = layout.put(run.restored_states())
  else:
    state = initial_state(config, experiment, dataset.train, layout, source)
  if run.records and run.step == len(run.records) * steps_per_epoch:
    # The checkpoint was saved before the rate rules saw this epoch's loss.
    state = _after_epoch(state, run.records[-1], experiment, layout)

  # The step (`program.create`, or several a call: `many_steps`), and the hooks.
  key = augmentation_key(layout)
  run.on_event("compile")
  training = many_steps.create(
    *(config, experiment, state, dataset.train, key, layout),
    steps_per_call=steps_per_call,
  )
  before_step = layer_norms.create_hook(
    config, experiment, state, key, layout, write=run.write_scalars
  )
  before_save = batch_statistics.create_hook(
    config, experiment, state, dataset.train, layout
  )
  splits = {"val": dataset.validation, "test": dataset.test}
  run.start(state)
  return _Setup(
    state=state,
    layout=layout,
    training=training,
    eval_step=evaluate.create_eval_step(experiment, layout),
    splits={name: split for name, split in splits.items() if split is not None},
    before_step=before_step,
    before_save=before_save,
  )


def initial_state(
  config: ConfigDict,
  experiment: step_lib.Experiment,
  train: data.Split,
  layout: networks.Layout,
  source: Mapping[str, Any] | None = None,
) -> networks.Networks:
  """The state of all networks before the first step.

  `source`, from `load.load_source`, replaces random weights.
  """
  normalization = normalize.measure(config.normalization, train)

  def create() -> list[step_lib.TrainState]:
    states = []
    for seed in layout.seeds:
      key = randomness.device_key(seed, randomness.Purpose.INITIALIZATION)
      state = step_lib.create_train_state(experiment, key, normalization)
      if source:
        # The head may be missing. An optimizer's state may hold weights, too.
        variables = {**source, "params": state.params | source["params"]}
        state = step_lib.state_from(experiment, variables, normalization)
      states.append(state)
    return states

  return layout.put(hosts.from_first(create, lambda: jax.eval_shape(create)))


def augmentation_key(layout: networks.Layout) -> networks.Networks:
  """Each network's key[] for augmentation and dropout, equal at all steps."""
  purpose = randomness.Purpose.AUGMENTATION
  return layout.put([randomness.device_key(s, purpose) for s in layout.seeds])


# ---- After an epoch


def _after_epoch(
  state: networks.Networks,
  record: metrics.Record,
  experiment: step_lib.Experiment,
  layout: networks.Layout,
) -> networks.Networks:
  """Gives an epoch's loss to the learning-rate rules; returns the new state."""
  objective = metrics.monitored(record, "objective")
  # The epoch was not scored, or no rule follows its loss.
  if objective not in record or not experiment.learning_rate.rules:
    return state
  before = layout.get(layout.map(lambda chunk: chunk.rate_state, state))
  losses = [metrics.comparable(r[objective]) for r in metrics.of_seeds(record)]
  after = [*map(experiment.learning_rate.rules.after_epoch, before, losses)]
  return layout.map(
    lambda chunk, rate_state: chunk.replace(rate_state=rate_state),
    state,
    layout.put(after),
  )
