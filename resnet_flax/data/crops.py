"""Which part of an image the network sees: boxes in the image's own pixels.

An image is cut and resized in one step, so a box need not lie on whole pixels.
"""

import math
from collections.abc import Callable

import numpy as np

# (left, upper, right, lower).
Box = tuple[float, float, float, float]

# He et al. 2015, section 3.4, for crops of 224: the shorter side in training,
# and what it is for the central crop.
_SHORTER_SIDES = (256 / 224, 480 / 224)
_CENTRAL_SIDE = 256 / 224
NUM_TEN = 10


def central(width: int, height: int) -> Box:
  """The central square, of 224/256 of the shorter side."""
  return _square(width, height, _CENTRAL_SIDE, 0.5, 0.5)


def scored(size: tuple[int, int], side: int) -> Box:
  """What is scored at side x side: all of such an image, else `central`."""
  return (0, 0, side, side) if size == (side, side) else central(*size)


def corners_and_centre(width: int, height: int) -> list[Box]:
  """The five boxes whose crops and their mirror images are the ten crops.

  Krizhevsky et al. 2012, section 4.1: the shorter side is made 256, the central
  256 x 256 pixels are taken, and of these the corners and the centre.
  """
  side = min(width, height)
  x, y = (width - side) / 2, (height - side) / 2
  corners = ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5))
  boxes = (_square(side, side, _CENTRAL_SIDE, *corner) for corner in corners)
  return [(x + x0, y + y0, x + x1, y + y1) for x0, y0, x1, y1 in boxes]


def random_resized(rng: np.random.Generator, width: int, height: int) -> Box:
  """Inception's (Szegedy et al. 2014), as torchvision has it.

  It has 8 to 100 % of the area and a ratio of width to height from 3/4 to 4/3,
  uniform in its logarithm. If ten draws do not fit into the image, the largest
  central box of a ratio in that range.
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
  """A random square of the image resized at random."""
  side = rng.uniform(*_SHORTER_SIDES)
  return _square(width, height, side, rng.uniform(), rng.uniform())


def _square(
  width: int, height: int, shorter: float, across: float, down: float
) -> Box:
  """A square of side 1 where the shorter side is `shorter`; 0: left or top."""
  side = min(width, height) / shorter
  left, upper = across * (width - side), down * (height - side)
  # Rounding must not lead out of the image.
  return left, upper, min(left + side, width), min(upper + side, height)


# By `augment.name`.
RANDOM: dict[str, Callable[[np.random.Generator, int, int], Box]] = {
  "random_resized_crop": random_resized,
  "scale_crop": scale,
}
