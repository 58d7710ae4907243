import itertools

import jax
import numpy as np
import pytest

from resnet_flax import data as datasets, experiment as experiment_lib, train
from resnet_flax.parallel import calls as calls_lib, epochs, networks as seeds


def losses_of(config, dataset, devices, steps):
  """The loss of each of the first steps."""
  experiment = experiment_lib.build(config)
  layout = seeds.Layout.create(config, devices)
  state = train.initial_state(config, experiment, dataset.train, layout)
  key = train.augmentation_key(layout)
  compiled = calls_lib.compile_train_step(
    experiment, state, config.batch_size, key, layout
  )
  sums = [0.0]
  batches = epochs.all_batches(dataset.train, config.batch_size, layout)
  for images, labels in itertools.islice(batches, steps):
    state, step_metrics = compiled(state, images, labels, key)
    sums.append(float(step_metrics.sums.loss))
  return np.diff(sums) / config.batch_size


@pytest.mark.parametrize(("num_devices", "groups"), [(2, 2), (8, 1)])
def test_many_devices_compute_what_one_does(tiny_config, num_devices, groups):
  tiny_config.model.batch_norm_groups = groups
  tiny_config.batch_size = 16
  tiny_config.dataset.train_examples = 80
  dataset = datasets.load(tiny_config.dataset)
  one = losses_of(tiny_config, dataset, jax.devices()[:1], steps=5)
  many = losses_of(tiny_config, dataset, jax.devices()[:num_devices], steps=5)
  np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
  np.testing.assert_allclose(many, one, rtol=1e-4)


class Finite:
  """A step's metrics that say which step they are of."""

  def __init__(self, step):
    self.step, self.finite = step, True


@pytest.fixture
def layout(tiny_config, one_device):
  return seeds.Layout.create(tiny_config, one_device)


def test_metrics_are_read_one_step_late(layout):
  events = []
  batches = [(k, k) for k in range(3)]

  class State:
    step = 0

  def step_fn(state, images, labels, key):
    events.append(f"dispatch {images}")
    return state, Finite(images)

  calls_lib.train_steps(
    step_fn,
    State(),
    calls_lib.one_step_calls(batches, None),
    lambda of_seeds: events.append(f"read {of_seeds[0].step}"),
    layout=layout,
  )
  assert events == [
    "dispatch 0",
    "dispatch 1",
    "read 0",
    "dispatch 2",
    "read 1",
    "read 2",
  ]


def test_steps_until(layout):
  _, (last,) = calls_lib.train_steps(
    lambda state, images, labels, key: (state, Finite(images)),
    type("State", (), {"step": 5}),
    calls_lib.one_step_calls(((k, k) for k in range(9)), None),
    lambda step_metrics: None,
    until=lambda step: step == 8,
    layout=layout,
  )
  assert last.step == 2
