import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from resnet_flax.data import augment, augment_bytes

LABELS = jnp.zeros(8, jnp.int32)


def test_images_are_mirrored_in_every_other_epoch():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (400, 8, 8, 3), np.uint8)
  odd = [2 * i + 1 for i in range(8 * 8 * 3)]

  def mirrored(image, epoch):  # With integers of any size.
    pixels = zip(image.ravel().tolist(), odd, strict=True)
    total = sum(pixel * weight * 2654435761 for pixel, weight in pixels)
    return (total % 2**32 // 2**31 + epoch) % 2 == 1

  config = base.get_config().augment
  config.alternating_flip = True
  created = augment_bytes.create(config)
  for epoch in range(3):
    expected = [
      image[:, ::-1] if mirrored(image, epoch) else image for image in images
    ]
    found = created(
      jax.random.key(epoch), jnp.asarray(images), jnp.int32(epoch)
    )
    np.testing.assert_array_equal(found, expected)
  half = np.mean([mirrored(image, 0) for image in images])
  assert 0.4 < half < 0.6
  # Nothing else is mirrored, then.
  config.name = "none"
  moves = augment.create_augment(config, 10)
  kept, _ = moves(jax.random.key(0), images, LABELS)
  np.testing.assert_array_equal(kept, images)
  config.name = "shift_flip"
  moves = augment.create_augment(config, 10)
  ramps = np.broadcast_to(np.arange(8.0)[:, None], (64, 8, 8, 1))
  ramped, _ = moves(jax.random.key(0), jnp.asarray(ramps), LABELS)
  assert np.all(np.diff(ramped, axis=2) >= 0)


def test_no_key_is_used_for_bytes_and_for_normalised_images(monkeypatch):
  config = base.get_config().augment
  config.trivial_augment = True
  keys = []
  monkeypatch.setattr(
    augment_bytes, "trivial_augment", lambda key, images: keys.append(key)
  )

  def note(key, *operands):
    keys.append(key)
    return operands

  key = jax.random.key(0)
  augment_bytes.create(config)(key, None, 0)
  augment.compose(*[note] * 9)(key, None, None)
  data = {tuple(jax.random.key_data(each).tolist()) for each in keys}
  assert len(data) == len(keys) == 10
