"""TrivialAugment's operations against Pillow's, and how they are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps
import pytest

from resnet_flax.data import trivial_augment

LEVELS = np.arange(31) / 30


def affine(image, *numbers):
  return image.transform(image.size, PIL.Image.Transform.AFFINE, numbers)


def enhance(name):
  def operation(image, level):
    enhancer = getattr(PIL.ImageEnhance, name)(image)
    return enhancer.enhance(1 + 0.99 * level)

  return operation


# As torchvision's TrivialAugmentWide and the authors' code call Pillow.
PILLOWS = {
  "identity": lambda image, level: image,
  "auto_contrast": lambda image, level: PIL.ImageOps.autocontrast(image),
  "equalize": lambda image, level: PIL.ImageOps.equalize(image),
  "rotate": lambda image, level: image.rotate(135 * level),
  "solarize": lambda image, level: PIL.ImageOps.solarize(
    image, np.linspace(255, 0, 31)[round(abs(30 * level))]
  ),
  "color": enhance("Color"),
  "posterize": lambda image, level: PIL.ImageOps.posterize(
    image, 8 - round(abs(30 * level) / 5)
  ),
  "contrast": enhance("Contrast"),
  "brightness": enhance("Brightness"),
  "sharpness": enhance("Sharpness"),
  "shear_x": lambda image, level: affine(image, 1, 0.99 * level, 0, 0, 1, 0),
  "shear_y": lambda image, level: affine(image, 1, 0, 0, 0.99 * level, 1, 0),
  "translate_x": lambda image, level: affine(
    image, 1, 0, int(32 * level), 0, 1, 0
  ),
  "translate_y": lambda image, level: affine(
    image, 1, 0, 0, 0, 1, int(32 * level)
  ),
}
MOVES = ("rotate", "shear_x", "shear_y")


def pictures():
  """Noise, a dark gradient, one colour, two values: uint8[32, 40, 3] each."""
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (32, 40, 3))
  gradient = np.mgrid[:32, :40].sum(0)[..., None] + np.array([0, 40, 90])
  flat = np.full((32, 40, 3), 77)
  two = 60 + 90 * (noise > 200)
  return [np.uint8(each) for each in (noise, gradient, flat, two)]


def test_the_names_are_all():
  assert list(PILLOWS) == list(trivial_augment.OPERATIONS)


@pytest.mark.parametrize("name", PILLOWS)
def test_operations_are_pillows(name):
  operation = jax.jit(trivial_augment.OPERATIONS[name])
  wrong = 0
  signed = [*-LEVELS[1:], *LEVELS]
  for picture in pictures():
    for level in signed:
      expected = np.asarray(PILLOWS[name](PIL.Image.fromarray(picture), level))
      found = operation(jnp.asarray(picture, jnp.int32), jnp.float32(level))
      difference = np.abs(np.asarray(found) - expected)
      if name not in MOVES:
        # What float32 cuts off differently.
        assert difference.max() <= 1
      wrong += np.mean(difference > 0)
  # Pixels on the border between two, in Pillow's fixed-point numbers.
  assert wrong / (len(signed) * len(pictures())) < 0.005


def test_images_of_one_channel():
  picture = pictures()[0][..., :1]
  gray = PIL.Image.fromarray(picture[..., 0])
  for name, operation in trivial_augment.OPERATIONS.items():
    found = operation(jnp.asarray(picture, jnp.int32), jnp.float32(0.3))
    expected = np.asarray(PILLOWS[name](gray, 0.3))
    difference = np.abs(np.asarray(found)[..., 0] - expected)
    assert np.mean(difference > 1) < 0.01


def test_every_image_gets_an_operation_and_a_level_of_its_own(monkeypatch):
  """All operations are equally frequent, with both signs and 31 levels."""
  shown = {
    name: lambda x, level, k=k: (
      jnp.zeros_like(x)
      .at[0, 0]
      .set(jnp.stack([k, jnp.round(abs(30 * level)).astype(int), level > 0]))
    )
    for k, name in enumerate(trivial_augment.OPERATIONS)
  }
  monkeypatch.setattr(trivial_augment, "OPERATIONS", shown)
  images = jnp.zeros((7000, 2, 2, 3), jnp.uint8)
  found = np.asarray(
    trivial_augment.trivial_augment(jax.random.key(0), images)
  )[:, 0, 0]
  operations, levels, signs = found.T
  counts = np.bincount(operations, minlength=14)
  assert len(counts) == 14
  assert np.abs(counts - 500).max() < 4 * np.sqrt(500)
  counts = np.bincount(levels, minlength=31)
  assert len(counts) == 31
  assert np.abs(counts - 7000 / 31).max() < 4 * np.sqrt(7000 / 31)
  assert abs(signs[levels > 0].mean() - 0.5) < 0.03
  assert np.abs(np.corrcoef(found.T)[np.triu_indices(3, 1)]).max() < 0.2


def test_a_batch_is_its_images_one_by_one():
  images = jnp.asarray(np.stack(pictures() * 8))
  key = jax.random.key(2)
  found = jax.jit(trivial_augment.trivial_augment)(key, images)
  assert found.dtype == jnp.uint8
  keys = jax.random.split(key, 3)
  numbers = jax.random.randint(keys[0], (32,), 0, 14)
  levels = jax.random.randint(keys[1], (32,), 0, 31) / 30
  levels *= jax.random.rademacher(keys[2], (32,), jnp.float32)
  kinds = list(trivial_augment.OPERATIONS.values())
  for k in range(32):
    one = kinds[numbers[k]](images[k].astype(jnp.int32), levels[k])
    # Compiled together, products are rounded in another order.
    difference = np.abs(np.asarray(one) - np.asarray(found[k], np.int32))
    assert np.mean(difference > 0) < 0.02
