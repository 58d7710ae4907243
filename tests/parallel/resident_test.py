"""Several training steps in one call, on a split that lies on the devices."""

import os
import re
import signal

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from resnet_flax import data as datasets, experiment as experiment_lib, train
from resnet_flax.parallel import (
  calls as calls_lib,
  epochs,
  networks as seeds,
  resident,
)
from resnet_flax.run import checkpoint, errors, metrics


@pytest.fixture(scope="module")
def config(make_tiny_config, tmp_path_factory):
  """Three epochs of five steps, which leave four images."""
  config = make_tiny_config(tmp_path_factory.mktemp("cache"))
  config.num_epochs = 3
  config.dataset.train_examples = 44
  # One before batch norm has no gradient but rounding errors, of which Adam
  # makes whole steps.
  config.model.conv_bias = False
  return config


@pytest.fixture(scope="module")
def split(config):
  return datasets.load(config.dataset).train


def changed(config, **values):
  return ConfigDict(config.to_dict() | values)


def layout_of(config, num_devices=1, num_seeds=1, execution="in_turn"):
  config = changed(config, num_seeds=num_seeds)
  return seeds.Layout.create(config, jax.devices()[:num_devices], execution)


class LittleMemory:
  """A layout whose devices have so many bytes."""

  def __init__(self, layout, limit):
    self._layout, self._limit = layout, limit
    self.mesh = self

  shape = property(lambda self: self._layout.mesh.shape)
  devices = property(lambda self: np.array(self.local_devices))
  platform = "gpu"

  @property
  def local_devices(self):
    return [self] * self._layout.mesh.size

  def memory_stats(self):
    return {"bytes_limit": self._limit, "bytes_in_use": 0}


@pytest.mark.parametrize(
  ("wanted", "limit", "chosen"),
  [
    (0, 1_000_000, resident.STEPS_PER_CALL),
    (7, 1_000_000, 7),
    # Four times an eighth of 135,168 bytes.
    (0, 67_584, resident.STEPS_PER_CALL),
    (0, 67_583, 1),
    (1, 10, 1),
  ],
)
def test_chosen_by_memory(config, split, wanted, limit, chosen):
  layout = LittleMemory(layout_of(config, 8), limit)
  assert resident.steps_per_call(wanted, split, layout, 32) == chosen


def test_a_split_that_does_not_fit_is_named(config, split):
  layout = LittleMemory(layout_of(config, 8), 67_583)
  with pytest.raises(errors.ConfigError, match="steps_per_call=7 needs"):
    resident.steps_per_call(7, split, layout, 32)


def test_images_that_are_decoded_while_training_are_not_there(config):
  class Streamed(datasets.Split):
    image_shape = 32, 32, 3
    batches = subset = None

  layout = LittleMemory(layout_of(config), 10**9)
  assert resident.steps_per_call(0, Streamed(), layout, 32) == 1
  with pytest.raises(errors.ConfigError, match="steps_per_call=7 needs"):
    resident.steps_per_call(7, Streamed(), layout, 32)


def test_one_step_on_cpus_and_for_large_images(config, split):
  on_cpu = layout_of(config)
  assert resident.steps_per_call(0, split, on_cpu, 32) == 1
  assert resident.steps_per_call(9, split, on_cpu, 32) == 9
  layout = LittleMemory(on_cpu, 10**9)
  assert resident.steps_per_call(0, split, layout, 224) == 1
  assert resident.steps_per_call(9, split, layout, 224) == 9


@pytest.mark.parametrize(
  ("first", "last", "steps", "multiples", "ends"),
  [
    (0, 10, 4, (), [4, 8, 10]),
    (3, 10, 4, (0, 0), [7, 10]),
    (0, 10, 4, (5, 0), [4, 5, 9, 10]),
    (12, 20, 50, (5, 4), [15, 16, 20]),
    (5, 5, 4, (), []),
  ],
)
def test_calls_end_where_something_is_done(first, last, steps, multiples, ends):
  found = list(resident.call_ends(first, last, steps, multiples))
  assert found == ends


@pytest.fixture(scope="module")
def compiled(config):
  """A function of a layout and a split that compiles any number of steps."""
  programs = {}

  def compile_steps(layout, placed, is_divided=False):
    # Of one network, whatever its seed.
    name = layout.mesh, layout.per_call, layout.num_calls, is_divided
    if name not in programs:
      state, key = initial(config, layout)
      programs[name] = calls_lib.compile_train_steps(
        experiment_lib.build(config),
        state,
        placed,
        config.batch_size,
        key,
        layout,
      )
    return programs[name]

  return compile_steps


def initial(config, layout):
  experiment = experiment_lib.build(config)
  split = datasets.load(config.dataset).train
  state = train.initial_state(config, experiment, split, layout)
  return state, train.augmentation_key(layout)


def many(config, split, layout, program, ends, placed):
  """The states, on the host, after calls of the second epoch that end there."""
  state, key = initial(config, layout)
  state = layout.each(lambda one: one.replace(step=one.step + 5), state)
  calls = calls_lib.many_step_calls(
    split, placed, config.batch_size, 1, key, layout, ends
  )
  state, last = calls_lib.train_steps(
    program, state, calls, lambda _: None, layout=layout
  )
  return layout.get(state), last


def one_by_one(config, split, layout):
  experiment = experiment_lib.build(config)
  state, key = initial(config, layout)
  state = layout.each(lambda one: one.replace(step=one.step + 5), state)
  step = calls_lib.compile_train_step(
    experiment, state, config.batch_size, key, layout
  )
  batches = epochs.batches(split, config.batch_size, 1, layout)
  state, last = calls_lib.train_steps(
    step,
    state,
    calls_lib.one_step_calls(batches, key),
    lambda _: None,
    layout=layout,
  )
  return layout.get(state), last


def assert_close(one, other):
  assert int(one.step) == int(other.step) == 10
  assert one.epoch_sums.count == other.epoch_sums.count == 40
  for name in ("loss", "objective"):
    values = [float(getattr(each.epoch_sums, name)) for each in (one, other)]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_calls_compute_what_single_steps_do(config, split, compiled):
  """Wherever calls end, to the bit; single steps may round otherwise."""
  layout = layout_of(config)
  placed = resident.place(split, layout)
  program = compiled(layout, placed)
  (at_once,), (last,) = many(config, split, layout, program, [10], placed)
  (cut,), _ = many(config, split, layout, program, [6, 9, 10], placed)
  jax.tree.map(np.testing.assert_array_equal, at_once, cut)
  assert int(last.step) == 9
  assert last.finite
  (single,), (last_single,) = one_by_one(config, split, layout)
  assert_close(at_once, single)
  assert last.learning_rate == last_single.learning_rate


@pytest.mark.parametrize(
  ("num_devices", "num_seeds", "execution"),
  [(2, 3, "in_turn"), (1, 2, "vectorized")],
)
def test_several_seeds(
  config, split, compiled, num_devices, num_seeds, execution
):
  layout = layout_of(config, num_devices, num_seeds, execution)
  placed = resident.place(split, layout)
  program = compiled(layout, placed)
  states, lasts = many(config, split, layout, program, [8, 10], placed)
  assert len(states) == len(lasts) == num_seeds
  for seed, state in enumerate(states, config.seed):
    of_one = layout_of(changed(config, seed=seed))
    placed = resident.place(split, of_one)
    program = compiled(of_one, placed)
    (single,), _ = many(config, split, of_one, program, [10], placed)
    assert_close(state, single)


def collectives(program):
  """What a compiled program sends between devices: names and element types."""
  found = re.findall(
    r"= (\w+)\[([\d,]*)\]\S* (all-\w+|reduce-scatter|collective-\w+)\(",
    program.as_text(),
  )
  return {(kind, dtype) for dtype, _, kind in found}


@pytest.mark.parametrize("is_divided", [False, True])
def test_split_on_many_devices(
  config, split, compiled, monkeypatch, is_divided
):
  """Copied or divided: the same results; copies need no other's images."""
  layout = layout_of(config, 8)
  if is_divided:
    monkeypatch.setattr(
      resident, "_fits", lambda split, layout, shards: shards > 1
    )
  placed = resident.place(split, layout)
  assert placed.images.sharding.is_fully_replicated != is_divided
  assert placed.labels.shape == ((48,) if is_divided else (44,))
  program = compiled(layout, placed, is_divided)
  (state,), _ = many(config, split, layout, program, [7, 10], placed)
  one = layout_of(config)
  whole = resident.place(split, one)
  (single,), _ = many(config, split, one, compiled(one, whole), [10], whole)
  assert_close(state, single)
  sent = {kind for kind, dtype in collectives(program) if dtype == "u8"}
  assert sent == ({"all-reduce"} if is_divided else set())


def test_a_run_goes_on_with_calls_of_another_length(
  config, tmp_path, one_device, monkeypatch
):
  """And ends them where it saves; every step is in the records once."""
  config = changed(config, steps_per_call=3, num_epochs=2)
  config.checkpoint.every_steps = 4
  straight = tmp_path / "straight"
  train.train_and_evaluate(config, straight, devices=one_device)
  saved = []
  save = checkpoint.Checkpoints.save

  def dying(self, state, notes):
    saved.append(int(state.step))
    if len(saved) == 4:
      raise SystemExit
    save(self, state, notes)

  workdir = tmp_path / "run"
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, "save", dying)
    with pytest.raises(SystemExit):
      train.train_and_evaluate(config, workdir, devices=one_device)
  assert saved == [4, 5, 8, 10]
  other = changed(config, steps_per_call=2)
  train.train_and_evaluate(other, workdir, devices=one_device)
  first, second = (
    metrics.MetricsLog(path).read() for path in (straight, workdir)
  )
  assert metrics.untimed(first) == metrics.untimed(second)


def test_a_signal_saves_where_a_call_ends(
  config, tmp_path, one_device, monkeypatch
):
  config = changed(config, steps_per_call=3, num_epochs=2)
  read, signals = calls_lib._read, [signal.SIGTERM]

  def signalling(*arguments):
    if signals:
      os.kill(os.getpid(), signals.pop())
    return read(*arguments)

  with monkeypatch.context() as patch:
    # After the first call, which is read when the second one has begun.
    patch.setattr(calls_lib, "_read", signalling)
    with pytest.raises(errors.Interrupted, match="saved up to step 5"):
      train.train_and_evaluate(config, tmp_path / "run", devices=one_device)


def test_the_step_that_is_not_finite_is_named(
  config, split, compiled, one_device
):
  """Not the last one of its call."""
  layout = layout_of(config)
  placed = resident.place(split, layout)
  state, key = initial(config, layout)
  broken = jax.tree.map(lambda leaf: leaf * np.nan, state.params)
  calls = calls_lib.many_step_calls(
    split, placed, config.batch_size, 0, key, layout, [4, 5]
  )
  with pytest.raises(errors.NonFiniteError, match=r"after step 0 ") as caught:
    calls_lib.train_steps(
      compiled(layout, placed),
      state.replace(params=broken),
      calls,
      lambda _: None,
      layout=layout,
    )
  assert caught.value.step == 0
