"""Crop boxes: the part of an image that the network sees, in image pixels.

An image is cut and resized in one step, so a box need not lie on whole pixels.
"""

import math
from collections.abc import Callable

import numpy as np

# (left, upper, right, lower).
Box = tuple[float, float, float, float]

# He et al. 2015, section 3.4: the image's shorter side / the crop's side (224).
# Training draws it from a range; scoring uses one value.
_SHORTER_SIDES = (256 / 224, 480 / 224)
_CENTRAL_SIDE = 256 / 224
TEN_CROPS = 10


def scored(size: tuple[int, int], side: int) -> Box:
  """The box to score: the central square of 224/256 of the shorter side.

  An image of side x side pixels is scored whole.
  """
  whole = size == (side, side)
  return _square(*size, 1 if whole else _CENTRAL_SIDE, 0.5, 0.5)


def corners_and_centre(width: int, height: int) -> list[Box]:
  """Five boxes; their crops and mirror images are the ten crops.

  Krizhevsky et al. 2012, sections 2 and 4.1: resize the shorter side to 256,
  take the central 256 x 256 pixels, then this square's corners and centre.
  """
  side = min(width, height)
  x, y = (width - side) / 2, (height - side) / 2
  corners = ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5))
  boxes = (_square(side, side, _CENTRAL_SIDE, *corner) for corner in corners)
  return [(x + x0, y + y0, x + x1, y + y1) for x0, y0, x1, y1 in boxes]


def random_resized(rng: np.random.Generator, width: int, height: int) -> Box:
  """A random box as in Inception (Szegedy et al. 2014) and torchvision.

  The box has 8 to 100 % of the area. Its ratio of width to height is from 3/4
  to 4/3, uniform in the logarithm. If none of ten draws fits into the image,
  this returns the largest central box with a ratio in that range.
  """
  for _ in range(10):
    area = width * height * rng.uniform(0.08, 1.0)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left = int(rng.integers(0, width - w + 1))
      upper = int(rng.integers(0, height - h + 1))
      return left, upper, left + w, upper + h
  right, lower = min(width, height * (4 / 3)), min(height, width / (3 / 4))
  x, y = (width - right) / 2, (height - lower) / 2
  return x, y, x + right, y + lower


def scale(rng: np.random.Generator, width: int, height: int) -> Box:
  """A square of random size at a random place, as in He et al. 2015."""
  side = rng.uniform(*_SHORTER_SIDES)
  return _square(width, height, side, rng.uniform(), rng.uniform())


def _square(
  width: int, height: int, shorter: float, across: float, down: float
) -> Box:
  """A square of 1 / `shorter` of the shorter side; `across`, `down`: 0 to 1."""
  side = min(width, height) / shorter
  left, upper = across * (width - side), down * (height - side)
  # Rounding must not move the box out of the image.
  return left, upper, min(left + side, width), min(upper + side, height)


# Draws the box of an image of some width and height.
Random = Callable[[np.random.Generator, int, int], Box]

# The keys are values of `augment.name`.
RANDOM: dict[str, Random] = {
  "random_resized_crop": random_resized,
  "scale_crop": scale,
}
