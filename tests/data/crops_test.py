import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from resnet_flax.data import crops

SIDES = st.integers(1, 5000)


def is_inside(box, width, height):
  left, upper, right, lower = box
  return 0 <= left < right <= width and 0 <= upper < lower <= height


@settings(deadline=None, derandomize=True, max_examples=300)
@given(SIDES, SIDES, st.integers(0, 2**32 - 1))
def test_boxes_lie_in_images_of_any_size(width, height, seed):
  assert is_inside(crops.scored((width, height), 0), width, height)
  for box in crops.corners_and_centre(width, height):
    assert is_inside(box, width, height)
  for crop in crops.RANDOM.values():
    box = crop(np.random.default_rng(seed), width, height)
    assert is_inside(box, width, height)


def test_central_crop_is_224_of_256():
  # The image resized to 341 x 256, of which 224 x 224 are cut.
  assert crops.scored((500, 375), 224) == pytest.approx(
    [250 - 164.0625, 187.5 - 164.0625, 250 + 164.0625, 187.5 + 164.0625]
  )


def test_ten_crops_are_of_the_central_square():
  # 256 of the resized image are 375 pixels of this one, 224 are 328.125.
  boxes = crops.corners_and_centre(500, 375)
  assert len(boxes) == crops.TEN_CROPS // 2
  size, last = 328.125, 375 - 328.125
  for box, (left, upper) in zip(
    boxes,
    [(0, 0), (last, 0), (0, last), (last, last), (last / 2, last / 2)],
    strict=True,
  ):
    left += 62.5
    assert box == pytest.approx([left, upper, left + size, upper + size])
  assert boxes[-1] == pytest.approx(crops.scored((500, 375), 224))


def drawn(name, count=3000):
  rng = np.random.default_rng(0)
  boxes = np.array([crops.RANDOM[name](rng, 500, 375) for _ in range(count)])
  left, upper, right, lower = boxes.T
  return left, upper, right - left, lower - upper


def test_random_resized_crops():
  left, upper, width, height = drawn("random_resized_crop")
  area, ratio = width * height / (500 * 375), width / height
  assert 0.079 < area.min() < 0.1
  assert 0.98 < area.max() <= 1
  assert 0.74 < ratio.min() < 0.76
  assert 1.32 < ratio.max() < 1.35
  # Everywhere from edge to edge.
  assert left.min() == upper.min() == 0
  assert (left + width).max() == 500
  # Logarithms of ratios are uniform where the area leaves all of them.
  small = np.log(ratio[area < 0.5])
  assert abs(small.mean()) < 0.01


def test_scale_crops_are_squares_of_the_papers_sizes():
  left, upper, width, height = drawn("scale_crop")
  np.testing.assert_allclose(width, height)
  shorter = 375 * 224 / width
  assert 256 <= shorter.min() < 258
  assert 478 < shorter.max() <= 480
  # Uniform in the resized image.
  assert abs(shorter.mean() - 368) < 5
  assert abs((left / (500 - width)).mean() - 0.5) < 0.02
  assert abs((upper / (375 - height)).mean() - 0.5) < 0.02


def test_what_no_draw_fits_is_cut_in_the_middle():
  box = crops.random_resized(np.random.default_rng(0), 1000, 10)
  assert box == pytest.approx((500 - 10 * 2 / 3, 0, 500 + 10 * 2 / 3, 10))
