import numpy as np
import pytest

from resnet_flax import data
from resnet_flax.parallel import program
from tests.helpers import changed, initial, layout_of, run_steps


def losses_of(config, num_devices, steps):
  """The loss of each of the first steps."""
  layout = layout_of(config, num_devices)
  experiment, split, state, key = initial(config, layout)
  training = program.create(config, experiment, state, split, key, layout)
  _, found = run_steps(training, state, [0], layout, steps)
  sums = [0.0, *(float(of_seed.sums["loss"]) for (of_seed,) in found)]
  return np.diff(sums) / config.batch_size


@pytest.mark.parametrize(
  ("num_devices", "groups"),
  [(2, 2), pytest.param(8, 1, marks=pytest.mark.slow)],
)
def test_many_devices_compute_what_one_does(tiny_config, num_devices, groups):
  tiny_config.model.batch_norm_groups = groups
  tiny_config.batch_size = 16
  tiny_config.dataset.train_examples = 80
  one = losses_of(tiny_config, 1, steps=5)
  many = losses_of(tiny_config, num_devices, steps=5)
  np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
  np.testing.assert_allclose(many, one, rtol=1e-4)


def test_batches_depend_on_seed_and_epoch(tiny_config):
  split = data.load(tiny_config.dataset).train

  def labels_and_images(seed, epoch, batch_size=5):
    layout = layout_of(changed(tiny_config, seed=seed))
    batches = program.epoch_batches(split, batch_size, epoch, layout)
    found = [
      [layout.get(networks)[0] for networks in batch] for batch in batches
    ]
    return [(images.tobytes(), list(labels)) for images, labels in found]

  first = labels_and_images(seed=0, epoch=0)
  # 32 images make 6 batches of 5; the last two images are dropped.
  assert len(first) == 6
  assert labels_and_images(seed=0, epoch=0) == first
  assert labels_and_images(seed=0, epoch=1) != first
  assert labels_and_images(seed=1, epoch=0) != first
  (whole,) = labels_and_images(seed=0, epoch=0, batch_size=32)
  assert sorted(whole[1]) == sorted(split.take(np.arange(32))[1])


def test_an_epoch_can_begin_in_its_middle(tiny_config):
  split = data.load(tiny_config.dataset).train
  layout = layout_of(tiny_config)

  def labels(first):
    batches = program.epoch_batches(split, 8, 3, layout, first=first)
    return [layout.get(of_batch)[0].tolist() for _, of_batch in batches]

  assert labels(2) == labels(0)[2:]
