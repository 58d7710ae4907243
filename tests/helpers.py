"""Helpers of several test files: layouts, states, steps, kills."""

import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict

from resnet_flax import data, step as step_lib, train
from resnet_flax.parallel import evaluate, networks, program
from resnet_flax.run import (
  checkpoint,
  command_line,
  experiment as experiment_lib,
  metrics,
  rules,
)

ROOT = pathlib.Path(__file__).parents[1]


def run_module(module, *arguments, cwd=ROOT):
  """Runs `python -m MODULE ARGUMENTS` with this checkout's package."""
  return subprocess.run(
    [sys.executable, "-m", module, *map(str, arguments)],
    cwd=cwd,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def parse_command_line(*argv, then=lambda: None):
  """Checked configuration and workdir of a command; leaves no flags behind.

  `then` is called while the flags are parsed.
  """
  from resnet_flax import main  # noqa: F401, for its flags.

  known = set(flags.FLAGS)
  with pytest.MonkeyPatch.context() as patch:
    # ml_collections looks for overrides there.
    patch.setattr(sys, "argv", list(argv))
    try:
      command_line.parse_flags(list(argv))
      parsed, workdir = command_line.config_and_workdir()
      rules.check(parsed, num_devices=1)
      then()
      return parsed, workdir
    finally:
      flags.FLAGS.unparse_flags()
      # The next config file would be loaded into what this one left.
      sys.modules.pop("config_config", None)
      for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)


def changed(config, **values):
  """A copy of a configuration with other top-level values."""
  return ConfigDict(config.to_dict() | values)


def layout_of(config, num_devices=1, num_seeds=1, execution="in_turn"):
  """The layout of so many seeds on the first devices."""
  config = changed(config, num_seeds=num_seeds)
  return networks.Layout.create(config, jax.devices()[:num_devices], execution)


def initial(config, layout):
  """Experiment, training split, initial states and augmentation keys."""
  experiment = experiment_lib.build(config)
  split = data.load(config.dataset).train
  state = train.initial_state(config, experiment, split, layout)
  return experiment, split, state, train.augmentation_key(layout)


def run_steps(training, state, epochs, layout, count=None):
  """States after steps of epochs, and the metrics of each call and seed."""
  calls = itertools.chain.from_iterable(
    training.batches(epoch, 0) for epoch in epochs
  )
  found = []
  for batch in itertools.islice(calls, count):
    state, step_metrics = training.step(state, batch)
    found.append(layout.get(step_metrics))
  return state, found


def assert_identical(one, other):
  """Two trees of arrays are the same, to the bit."""
  jax.tree.map(np.testing.assert_array_equal, one, other)


def contents(folder):
  """The bytes of all files below a folder by their paths in it."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def saved_steps(workdir):
  """The steps of a workdir's checkpoints."""
  return checkpoint.steps(pathlib.Path(workdir))


def restore(config, workdir, step=None):
  """A checkpoint of a run, by default the latest, as a tree of arrays."""
  like = experiment_lib.abstract_state(config, experiment_lib.build(config))
  return checkpoint.restore(workdir, step or saved_steps(workdir)[-1], like)[0]


def assert_same_run(config, one, other):
  """Checkpoints and records are the same, to the bit."""
  assert untimed(metrics.MetricsLog(one).read()) == untimed(
    metrics.MetricsLog(other).read()
  )
  records = metrics.MetricsLog(one).read()
  best = metrics.best_record(records, "accuracy")["step"]
  assert saved_steps(one)[-1] == saved_steps(other)[-1]
  like = experiment_lib.abstract_state(config, experiment_lib.build(config))
  for step in {saved_steps(one)[-1], best}:
    assert_identical(
      *(checkpoint.restore(each, step, like)[0] for each in (one, other))
    )


def untimed(records):
  """Records without what is measured of the machine, to compare runs."""
  return [
    {key: value for key, value in record.items() if key not in metrics.TIMED}
    for record in records
  ]


def at_event(name, count, action):
  """An `on_event` that acts at the given occurrence of an event, from 1."""
  events = itertools.count(1)

  def on_event(event):
    if event == name and next(events) == count:
      action()

  return on_event


def die():
  """Ends the run as a kill does: by an exception that nothing expects."""
  raise SystemExit


class Programs:
  """Trains configurations often; what they share is made once.

  Each program is compiled once a layout, and a seed's first state is drawn
  once. Whatever `num_epochs` is, all runs use the first run's learning rates.
  """

  def __init__(self):
    self._kept = {}

  def train(self, config, workdir, **arguments):
    """As `train.train_and_evaluate`."""
    settings = config.to_dict()
    about_runs = "num_epochs", "init_from", "checkpoint", "log"
    for name in (*about_runs, "eval_every_epochs"):
      del settings[name]
    del settings["log_layer_norms_every"], settings["dataset"]["cache_dir"]
    computed = json.dumps(settings, sort_keys=True)
    with pytest.MonkeyPatch.context() as patch:
      for module, name, own_key in (
        # Arguments: the title, the function, the layout, ...
        (program, "compile_function", lambda x: (x[0], x[2])),
        (evaluate, "create_eval_step", lambda x: x[-1]),
        (step_lib, "create_train_state", drawn_from),
      ):
        remembering = self._remember(getattr(module, name), computed, own_key)
        patch.setattr(module, name, remembering)
      return train.train_and_evaluate(config, workdir, **arguments)

  def _remember(self, function, computed, own_key):
    @functools.wraps(function)
    def remembering(*arguments, **options):
      key = function.__name__, computed, own_key(arguments)
      if key[-1] is None:
        return function(*arguments, **options)
      if key not in self._kept:
        # A step may be given a state's memory, but no array of NumPy's.
        self._kept[key] = jax.device_get(function(*arguments, **options))
      return self._kept[key]

    return remembering


def drawn_from(arguments):
  """The bits of the key that a state is drawn from; None if it is traced."""
  _, key, _ = arguments
  is_traced = isinstance(key, jax.core.Tracer)
  return None if is_traced else jax.random.key_data(key).tobytes()
