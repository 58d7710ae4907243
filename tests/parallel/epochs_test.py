import jax
import numpy as np

from resnet_flax import data as datasets
from resnet_flax.parallel import epochs, mesh as mesh_lib, networks as seeds


def test_batches_depend_on_seed_and_epoch(tiny_config):
  dataset = datasets.load(tiny_config.dataset)
  mesh = mesh_lib.create_mesh(jax.devices()[:1])

  def labels_and_images(seed, epoch, batch_size=5):
    layout = seeds.Layout((seed,), mesh, per_call=1)
    batches = epochs.batches(dataset.train, batch_size, epoch, layout)
    return [(np.asarray(x).tobytes(), list(np.asarray(y))) for x, y in batches]

  first = labels_and_images(seed=0, epoch=0)
  # 32 images make 6 batches of 5; the last two images are dropped.
  assert len(first) == 6
  assert labels_and_images(seed=0, epoch=0) == first
  assert labels_and_images(seed=0, epoch=1) != first
  assert labels_and_images(seed=1, epoch=0) != first
  (whole,) = labels_and_images(seed=0, epoch=0, batch_size=32)
  assert sorted(whole[1]) == sorted(dataset.train.take(np.arange(32))[1])


def test_all_batches_are_those_of_one_epoch_after_the_other(
  tiny_config, one_device
):
  dataset = datasets.load(tiny_config.dataset)
  layout = seeds.Layout.create(tiny_config, one_device)

  def labels(batches):
    return [np.asarray(labels).tolist() for _, labels in batches]

  endless = epochs.all_batches(dataset.train, 8, layout, first_epoch=3)
  expected = [
    batch
    for epoch in (3, 4)
    for batch in labels(epochs.batches(dataset.train, 8, epoch, layout))
  ]
  assert labels(next(endless) for _ in range(8)) == expected
