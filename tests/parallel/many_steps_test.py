"""Several training steps in one call, on a split that lies on the devices."""

import functools
import os
import re
import signal

import jax
import numpy as np
import pytest

from resnet_flax import data, train
from resnet_flax.parallel import many_steps, program
from resnet_flax.run import errors, metrics
from tests.helpers import (
  assert_identical,
  at_event,
  changed,
  die,
  initial,
  layout_of,
  run_steps,
  saved_steps,
  untimed,
)

slow = pytest.mark.slow


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
  return data.load(config.dataset).train


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
    (0, 1_000_000, many_steps.STEPS_PER_CALL),
    (7, 1_000_000, 7),
    # Four times 135,168 bytes.
    (0, 540_672, many_steps.STEPS_PER_CALL),
    (0, 540_671, 1),
    (1, 10, 1),
  ],
)
def test_chosen_by_memory(config, split, wanted, limit, chosen):
  layout = LittleMemory(layout_of(config, 8), limit)
  assert many_steps.choose(wanted, split, layout, 32) == chosen


def test_a_split_that_does_not_fit_is_named(config, split):
  layout = LittleMemory(layout_of(config, 8), 540_671)
  with pytest.raises(errors.ConfigError, match="steps_per_call=7 needs"):
    many_steps.choose(7, split, layout, 32)


def test_images_that_are_decoded_while_training_are_not_there(config):
  class Streamed(data.Split):
    image_shape = 32, 32, 3
    batches = subset = None

  layout = LittleMemory(layout_of(config), 10**9)
  assert many_steps.choose(0, Streamed(np.arange(9)), layout, 32) == 1
  with pytest.raises(errors.ConfigError, match="steps_per_call=7 needs"):
    many_steps.choose(7, Streamed(np.arange(9)), layout, 32)


def test_one_step_on_cpus_and_for_large_images(config, split):
  on_cpu = layout_of(config)
  assert many_steps.choose(0, split, on_cpu, 32) == 1
  assert many_steps.choose(9, split, on_cpu, 32) == 9
  layout = LittleMemory(on_cpu, 10**9)
  assert many_steps.choose(0, split, layout, 224) == 1
  assert many_steps.choose(9, split, layout, 224) == 9


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
  found = list(many_steps.call_ends(first, last, steps, multiples))
  assert found == ends


@pytest.fixture(scope="module")
def programs(config):
  """A function of a layout that makes its program, compiled once."""
  compiled = {}

  def make(layout, steps_per_call):
    experiment, split, state, key = initial(config, layout)
    name = layout.mesh, layout.chunk_size, len(state.chunks)
    if name not in compiled:
      compiled[name] = many_steps.create(
        config, experiment, state, split, key, layout, steps_per_call=5
      ).compiled
    with pytest.MonkeyPatch.context() as patch:
      # Of one network, whatever its seed, and any number of steps.
      patch.setattr(program, "compile_function", lambda *_, **__: None)
      training = many_steps.create(
        *(config, experiment, state, split, key, layout),
        steps_per_call=steps_per_call,
      )
    return program.Program(compiled[name], training.batches)

  return make


def second_epoch(config, layout, training):
  """The states, on the host, after the second epoch; the metrics of calls."""
  _, _, state, _ = initial(config, layout)
  state = layout.map(lambda one: one.replace(step=one.step + 5), state)
  state, found = run_steps(training, state, [1], layout)
  return layout.get(state), found


@pytest.fixture(scope="module")
def one_by_one(config):
  """The second epoch in single steps, on one device."""
  layout = layout_of(config)
  experiment, split, state, key = initial(config, layout)
  training = program.create(config, experiment, state, split, key, layout)
  return second_epoch(config, layout, training)


def assert_close(one, other):
  assert int(one.step) == int(other.step) == 10
  assert one.epoch_sums["count"] == other.epoch_sums["count"] == 40
  for name in ("loss", "objective"):
    values = [float(each.epoch_sums[name]) for each in (one, other)]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_calls_compute_what_single_steps_do(config, programs, one_by_one):
  """Calls of any length are bit-identical; single steps may round otherwise."""
  layout = layout_of(config)
  (at_once,), [(last,)] = second_epoch(config, layout, programs(layout, 5))
  (cut,), found = second_epoch(config, layout, programs(layout, 2))
  assert len(found) == 3
  assert_identical(at_once, cut)
  assert int(last.step) == 9
  assert last.finite
  (single,), found = one_by_one
  assert_close(at_once, single)
  assert last.learning_rate == found[-1][0].learning_rate


@pytest.mark.parametrize(
  ("num_devices", "num_seeds", "execution"),
  [(1, 2, "in_turn"), pytest.param(2, 3, "vectorized", marks=slow)],
)
def test_several_seeds(config, programs, num_devices, num_seeds, execution):
  layout = layout_of(config, num_devices, num_seeds, execution)
  states, _ = second_epoch(config, layout, programs(layout, 3))
  assert len(states) == num_seeds
  for seed, state in enumerate(states, config.seed):
    of_seed = changed(config, seed=seed)
    alone = layout_of(of_seed)
    experiment, split, first, key = initial(of_seed, alone)
    training = programs(alone, 5)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(program, "compile_function", lambda *_, **__: None)
      batches = many_steps.create(
        of_seed, experiment, first, split, key, alone, steps_per_call=5
      ).batches
    training = program.Program(training.compiled, batches)
    (single,), _ = second_epoch(of_seed, alone, training)
    assert_close(state, single)


def test_split_on_many_devices(config, programs, one_by_one):
  layout = layout_of(config, 8)
  training = programs(layout, 3)
  images, labels = next(training.batches(0, 0)).arguments[2:4]
  assert images.sharding.is_fully_replicated
  assert labels.shape == (44,)
  (state,), _ = second_epoch(config, layout, training)
  (single,), _ = one_by_one
  assert_close(state, single)


@pytest.mark.slow
def test_no_device_needs_anothers_images(config, programs):
  layout = layout_of(config, 8)
  experiment, _, state, key = initial(config, layout)
  images, labels = next(programs(layout, 3).batches(0, 0)).arguments[2:4]
  steps = experiment.learning_rate.steps_per_epoch
  traced = program.trace(
    functools.partial(many_steps.train_steps, experiment),
    layout,
    (state, layout.batch_shape((8, steps), np.int32), key),
    (images, labels, np.int32(0)),
    donate=True,
  )
  text = traced.lower().compile().as_text()
  sent = re.findall(r"= (.*) (?:all-|reduce-scatter|collective-)[\w-]+\(", text)
  assert any("f32[" in types for types in sent)
  assert not [types for types in sent if "u8[" in types]


@pytest.mark.slow
def test_a_run_resumes_with_calls_of_another_length(
  config, tmp_path, one_device
):
  """Calls end where the run saves; every step is in the records once."""
  config = changed(config, steps_per_call=3, num_epochs=2)
  config.checkpoint.every_steps = 4
  straight, workdir = tmp_path / "straight", tmp_path / "run"
  train.train_and_evaluate(config, straight, devices=one_device)
  # Calls end at 3, 4, 5; 8, 10: the save of step 10 is the fourth.
  with pytest.raises(SystemExit):
    train.train_and_evaluate(
      *(config, workdir),
      devices=one_device,
      on_event=at_event("save", 4, die),
    )
  assert saved_steps(workdir) == [5, 8]
  other = changed(config, steps_per_call=2)
  train.train_and_evaluate(other, workdir, devices=one_device)
  first, second = (
    metrics.MetricsLog(path).read() for path in (straight, workdir)
  )
  assert untimed(first) == untimed(second)


def test_a_signal_saves_where_a_call_ends(config, tmp_path, one_device):
  config = changed(config, steps_per_call=3, num_epochs=2)
  terminate = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
  with pytest.raises(errors.Interrupted, match="saved up to step 3"):
    train.train_and_evaluate(
      *(config, tmp_path / "run"),
      devices=one_device,
      on_event=at_event("step", 1, terminate),
    )


def test_the_step_that_is_not_finite_is_named(config, programs):
  """The error names this step, not the last step of its call."""
  layout = layout_of(config)
  _, _, state, _ = initial(config, layout)
  broken = layout.map(
    lambda one: one.replace(
      params=jax.tree.map(lambda leaf: leaf * np.nan, one.params)
    ),
    state,
  )
  _, [(first,)] = run_steps(programs(layout, 5), broken, [0], layout)
  assert not first.finite
  assert int(first.step) == 0
