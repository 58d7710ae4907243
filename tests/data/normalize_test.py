import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.data import normalize as normalization, types


@pytest.fixture
def split(random_images):
  images = random_images(10)
  images[..., 2] //= 3
  whole = types.whole_split(images, np.zeros(10, np.int32))
  return whole.subset(np.array([1, 4, 7]))


def test_pixel_mean(split):
  measured = normalization.measure("pixel_mean", split)
  images = split.take(np.arange(3))[0] / 255
  np.testing.assert_allclose(measured.mean, images.mean(0), rtol=1e-6)
  assert measured.mean.shape == (32, 32, 3)
  np.testing.assert_array_equal(measured.std, 1)


def test_channel(split):
  measured = normalization.measure("channel", split)
  images = split.take(np.arange(3))[0] / 255
  np.testing.assert_allclose(
    np.ravel(measured.mean), images.mean((0, 1, 2)), rtol=1e-6
  )
  np.testing.assert_allclose(
    np.ravel(measured.std), images.std((0, 1, 2)), rtol=1e-6
  )


def test_constant_channel_does_not_divide_by_zero():
  images = np.full((2, 4, 4, 3), 7, np.uint8)
  split = types.whole_split(images, np.zeros(2, np.int32))
  assert np.all(normalization.measure("channel", split).std > 0)


def test_none(split):
  measured = normalization.measure("none", split)
  assert np.all(measured.mean == 0)
  assert np.all(measured.std == 1)


@pytest.mark.parametrize("name", normalization.NAMES)
def test_placeholder_has_the_same_shapes(split, name):
  measured = normalization.measure(name, split)
  placeholder = normalization.placeholder(name, (32, 32, 3))
  assert placeholder.mean.shape == measured.mean.shape
  assert placeholder.std.shape == measured.std.shape


def test_normalization():
  mean = jnp.full((32, 32, 3), 0.25)
  std = jnp.full((1, 1, 3), 0.5)
  images = jnp.full((2, 32, 32, 3), 255, jnp.uint8)
  result = normalization.Normalization(mean, std)(images)
  assert result.dtype == jnp.float32
  np.testing.assert_allclose(result, 1.5)


@pytest.mark.parametrize(
  "images",
  [np.zeros((2, 32, 32, 3), np.float32), np.zeros((2, 32, 32, 1), np.uint8)],
)
def test_other_images_are_refused(images):
  """Floats from 0 to 1 would be divided by 255."""
  scale = normalization.fixed("imagenet", (32, 32, 3))
  with pytest.raises(ValueError, match="needs uint8 images of 3 channels; got"):
    scale(images)


@pytest.mark.parametrize(
  ("name", "white"),
  [
    ("imagenet", [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]),
    ("caffe", [255 - 123.68, 255 - 116.779, 255 - 103.939]),
  ],
)
def test_fixed_ones_are_the_published(name, white):
  """Red, green, blue of a white pixel, as torchvision and Keras make them."""
  pixel = np.full((1, 1, 1, 3), 255, np.uint8)
  found = normalization.fixed(name, (1, 1, 3))(pixel)
  np.testing.assert_allclose(np.ravel(found), white, rtol=1e-5)
