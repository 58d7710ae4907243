"""Cutout, mixup and CutMix against loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from resnet_flax.data import augment, mixing

CLASSES = 5


def batch(count=8, height=10, width=7):
  rng = np.random.default_rng(0)
  images = rng.normal(size=(count, height, width, 3)).astype(np.float32)
  return jnp.asarray(images), jnp.asarray(rng.integers(0, CLASSES, count))


@pytest.mark.parametrize("side", [1, 4, 5, 30])
def test_boxes_are_a_loop_over_pixels(side):
  size, key = (10, 7), jax.random.key(3)
  sides = jnp.asarray([[side, side], [side, 2], [0, side]])
  centers = np.asarray(
    jax.random.randint(key, sides.shape, 0, jnp.asarray([size]))
  )
  expected = np.zeros((3, *size), bool)
  for k, ((top, left), (rows, columns)) in enumerate(
    zip(centers - np.asarray(sides) // 2, np.asarray(sides), strict=True)
  ):
    for i in range(top, top + rows):
      for j in range(left, left + columns):
        if 0 <= i < size[0] and 0 <= j < size[1]:
          expected[k, i, j] = True
  np.testing.assert_array_equal(mixing.boxes(key, sides, size), expected)


def test_centers_of_boxes_are_all_pixels():
  sides = jnp.ones((4000, 2), int)
  found = np.asarray(mixing.boxes(jax.random.key(0), sides, (4, 3)))
  assert (found.sum((1, 2)) == 1).all()
  np.testing.assert_allclose(found.mean(0), 1 / 12, rtol=0.25)


def test_cutout_sets_a_square_of_every_image_to_zero():
  images, labels = batch()
  key = jax.random.key(1)
  cut = mixing.boxes(key, jnp.full((8, 2), 4), images.shape[1:3])
  expected = np.array(images)
  for image, square in zip(expected, np.asarray(cut), strict=True):
    assert 4 <= square.sum() <= 16  # At a corner a quarter is left.
    image[square] = 0
  found, targets = mixing.cutout(4)(key, images, labels)
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(targets, labels)


def test_mixed_is_a_loop_over_images_and_pixels():
  images, labels = batch()
  targets = jax.nn.one_hot(labels, CLASSES)
  shares = np.random.default_rng(1).uniform(size=(10, 7)).astype(np.float32)
  expected = np.zeros_like(images)
  expected_targets = np.zeros_like(targets)
  for k in range(len(images)):
    for i, j in np.ndindex(10, 7):
      own, other = images[k, i, j], images[k - 1, i, j]
      expected[k, i, j] = shares[i, j] * own + (1 - shares[i, j]) * other
    expected_targets[k, labels[k]] += shares.mean()
    expected_targets[k, labels[k - 1]] += 1 - shares.mean()
  found, found_targets = mixing.mixed(images, targets, jnp.asarray(shares))
  np.testing.assert_allclose(found, expected, atol=1e-6)
  np.testing.assert_allclose(found_targets, expected_targets, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_of_mixup_are_of_the_beta_distribution(alpha):
  draw = functools.partial(mixing.mixup_shares, alpha=alpha, size=(3, 2))
  shares = np.asarray(
    jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 4000))
  )
  assert (shares == shares[:, :1, :1]).all()
  # Mean 1/2, variance 1 / (4 * (2 * alpha + 1)).
  variance = 1 / (4 * (2 * alpha + 1))
  assert abs(shares[:, 0, 0].mean() - 0.5) < 4 * np.sqrt(variance / 4000)
  np.testing.assert_allclose(shares[:, 0, 0].var(), variance, rtol=0.05)


def test_boxes_of_cutmix_have_the_share_that_was_drawn():
  """1 - share of the area, less the part beyond the edges."""
  size = (40, 30)
  for k in range(20):
    key = jax.random.key(k)
    share_key, box_key = jax.random.split(key)
    share = float(jax.random.beta(share_key, 1.0, 1.0))
    sides = [int(np.sqrt(1 - share) * length) for length in size]
    expected = 1.0 - np.asarray(
      mixing.boxes(box_key, jnp.asarray([sides]), size)[0]
    )
    found = mixing.cutmix_shares(key, 1.0, size)
    np.testing.assert_array_equal(found, expected)
    assert expected.mean() >= 1 - sides[0] * sides[1] / (40 * 30) - 1e-6


def test_of_both_either_is_used_for_half_of_the_batches():
  images, labels = batch(4)
  mix = jax.jit(mixing.mix(1.0, 1.0, CLASSES))
  kept = []
  for k in range(100):
    found, targets = mix(jax.random.key(k), images, labels)
    np.testing.assert_allclose(np.sum(targets, axis=1), 1, rtol=1e-6)
    # CutMix leaves each pixel one image's.
    kept.append(
      ((found == images) | (found == np.roll(images, 1, axis=0))).all()
    )
  assert 30 < sum(kept) < 70


@pytest.mark.parametrize(
  ("changes", "steps"),
  [
    ({}, 2),
    ({"cutout": 4}, 3),
    ({"mixup": 1.0}, 3),
    ({"cutmix": 1.0, "cutout": 4}, 4),
  ],
)
def test_the_order_is_move_flip_cutout_mix(changes, steps):
  images, labels = batch(8, 12, 12)
  config = base.get_config().augment
  config.update(changes)
  key = jax.random.key(5)
  found = augment.create_augment(config, CLASSES)(key, images, labels)
  keys = jax.random.split(key, steps)
  x, targets = augment.random_shift(keys[0], images, labels)
  x, targets = augment.random_flip(keys[1], x, targets)
  if config.cutout:
    x, targets = mixing.cutout(4)(keys[2], x, targets)
  if config.mixup or config.cutmix:
    mix = mixing.mix(config.mixup, config.cutmix, CLASSES)
    x, targets = mix(keys[-1], x, targets)
  np.testing.assert_array_equal(found[0], x)
  np.testing.assert_array_equal(found[1], targets)


@pytest.mark.parametrize(
  ("alphas", "draw"),
  [((0.4, 0.0), mixing.mixup_shares), ((0.0, 0.4), mixing.cutmix_shares)],
)
def test_each_alpha_turns_on_its_own(alphas, draw):
  (images, labels), key = batch(), jax.random.key(0)
  found = mixing.mix(*alphas, CLASSES)(key, images, labels)
  shares = draw(jax.random.split(key)[1], 0.4, images.shape[1:3])
  expected = mixing.mixed(images, jax.nn.one_hot(labels, CLASSES), shares)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
