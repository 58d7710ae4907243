import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from configs import base
from resnet_flax.data import augment


def images_of(count=16, size=32):
  rng = np.random.default_rng(0)
  return rng.normal(size=(count, size, size, 3)).astype(np.float32)


LABELS = jnp.zeros(8, jnp.int32)


def create(name, flip=True):
  config = base.get_config().augment
  config.update({"name": name, "flip": flip})
  created = augment.create_augment(config, 10)
  return lambda key, images: created(key, images, LABELS)[0]


def test_translate_is_scipys_shift():
  images = images_of()
  rng = np.random.default_rng(1)
  shifts = rng.uniform(-3.2, 3.2, (len(images), 2)).astype(np.float32)
  shifts[0] = 0  # Nothing moves.
  shifts[1] = [2, -3]  # Whole pixels.
  shifts[2] = [40, -40]  # Beyond the edge: all from the nearest pixel.
  expected = np.stack(
    [
      scipy.ndimage.shift(image, (*shift, 0), order=1, mode="nearest")
      for image, shift in zip(images, shifts, strict=True)
    ]
  )
  moved = augment.translate(jnp.asarray(images), jnp.asarray(shifts))
  np.testing.assert_allclose(moved, expected, atol=1e-5)
  np.testing.assert_array_equal(moved[0], images[0])


def test_crop_is_a_numpy_loop():
  images = images_of()
  offsets = np.random.default_rng(1).integers(0, 9, (len(images), 2))
  padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
  expected = np.stack(
    [
      image[top : top + 32, left : left + 32]
      for image, (top, left) in zip(padded, offsets, strict=True)
    ]
  )
  cropped = augment.crop(jnp.asarray(images), jnp.asarray(offsets), 4)
  np.testing.assert_array_equal(cropped, expected)


def test_flip_mirrors_the_chosen_images():
  images = images_of(4)
  mirrored = np.array([True, False, False, True])
  expected = images.copy()
  expected[mirrored] = images[mirrored][:, :, ::-1]
  flipped = augment.flip(jnp.asarray(images), jnp.asarray(mirrored))
  np.testing.assert_array_equal(flipped, expected)


def test_shifts_are_uniform_within_a_tenth_of_the_size():
  # A ramp shows in its middle how far it was moved.
  size = 32
  ramp = np.broadcast_to(np.arange(size, dtype=np.float32), (2000, size, size))
  down, right = ramp.transpose(0, 2, 1), ramp
  images = jnp.asarray(np.stack([down, right, right], axis=-1))
  moved = create("shift_flip", flip=False)(jax.random.key(0), images)
  shifts = 16 - np.asarray(moved[:, 16, 16, :2])
  assert np.abs(shifts).max() <= 3.2 + 1e-4
  # Mean and standard deviation of the uniform distribution on ±3.2, to four
  # standard errors; continuous, so no two alike.
  assert np.abs(shifts.mean(0)).max() < 4 * 1.85 / np.sqrt(2000)
  np.testing.assert_allclose(shifts.std(0), 3.2 / np.sqrt(3), rtol=0.05)
  assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.1
  assert len(np.unique(np.round(shifts, 3))) > 1000


def test_crops_reach_every_offset():
  size = 32
  ramp = np.broadcast_to(np.arange(size, dtype=np.float32), (2000, size, size))
  images = jnp.asarray(np.stack([ramp.transpose(0, 2, 1), ramp], axis=-1))
  moved = create("crop_flip", flip=False)(jax.random.key(0), images)
  shifts = 16 - np.asarray(moved[:, 16, 16])
  for axis in range(2):
    assert set(shifts[:, axis]) == set(range(-4, 5))


def test_half_of_the_images_are_flipped():
  images = np.zeros((2000, 32, 32, 1), np.float32)
  images[:, :, :16] = 1
  flipped = create("shift_flip")(jax.random.key(0), jnp.asarray(images))
  share = np.mean(np.asarray(flipped)[:, 16, 0, 0] == 0)
  assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(2000)


def test_none_changes_nothing():
  images = jnp.asarray(images_of(4))
  result = create("none")(jax.random.key(0), images)
  np.testing.assert_array_equal(result, images)


@pytest.mark.parametrize("name", ["shift_flip", "crop_flip"])
def test_same_key_same_images_other_key_others(name):
  images = jnp.asarray(images_of(8))
  apply = create(name)
  first, again, other = (apply(jax.random.key(k), images) for k in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert (np.asarray(first) != np.asarray(other)).any()


def test_augmentations_compose_in_order_and_may_change_targets():
  """Each augmentation draws from its own key, which its place decides."""
  keys = []

  def halve(key, images, targets):
    keys.append(jax.random.key_data(key).tolist())
    return images / 2, targets

  def add_one(key, images, targets):
    keys.append(jax.random.key_data(key).tolist())
    return images + 1, jax.nn.one_hot(targets, 10)

  both = augment.compose(halve, add_one)
  images, targets = both(
    jax.random.key(0), jnp.ones((2, 4, 4, 3)), jnp.arange(2)
  )
  np.testing.assert_array_equal(images, 1.5)
  np.testing.assert_array_equal(targets, np.eye(10)[:2])
  expected = jax.random.key_data(jax.random.split(jax.random.key(0)))
  assert keys == expected.tolist()
