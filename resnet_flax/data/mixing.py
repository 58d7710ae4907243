"""Augmentations that cut a piece out of images or mix two of a batch.

Mixup is Zhang et al. 2018 (arXiv:1710.09412), CutMix Yun et al. 2019
(arXiv:1905.04899), cutout DeVries and Taylor 2017 (arXiv:1708.04552).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

Augment = Callable[[Array, Array, Array], tuple[Array, Array]]


def cutout(side: int) -> Augment:
  """Sets a square of each image to 0: the mean that normalisation subtracts.

  With normalization=none, the square is black. See `boxes`.
  """

  def augment(key, images, targets):
    sides = jnp.full((len(images), 2), side)
    cut = boxes(key, sides, images.shape[1:3])
    return jnp.where(cut[..., None], 0, images), targets

  return augment


def mix(mixup: float, cutmix: float, num_classes: int) -> Augment:
  """Mixup or CutMix by their alphas; with both, each batch draws one of them.

  Each image is mixed with the previous image of the batch. This is a random
  image, since every epoch is shuffled. Targets become probabilities.
  """
  kinds = ((mixup_shares, mixup), (cutmix_shares, cutmix))
  used = [kind for kind in kinds if kind[1]]

  def augment(key, images, targets):
    choice_key, key = jax.random.split(key)
    size = images.shape[1:3]
    shares = jnp.stack([draw(key, alpha, size) for draw, alpha in used])
    chosen = jax.random.randint(choice_key, (), 0, len(used))
    return mixed(images, jax.nn.one_hot(targets, num_classes), shares[chosen])

  return augment


def mixed(images: Array, targets: Array, shares: Array) -> tuple[Array, Array]:
  """Images and targets, float[B, classes], each mixed with the previous one.

  `shares`, float[H, W], are the weights of an image's own pixels; their mean is
  the weight of its own target.
  """

  def mix(x, share):
    return share * x + (1 - share) * jnp.roll(x, 1, axis=0)

  return mix(images, shares[None, ..., None]), mix(targets, jnp.mean(shares))


def mixup_shares(key, alpha, size):
  """float[H, W], all equal to one draw from Beta(alpha, alpha)."""
  return jnp.full(size, jax.random.beta(key, alpha, alpha))


def cutmix_shares(key, alpha, size):
  """float[H, W], 0 in a box and 1 around it (Yun et al. 2019, equation 2)."""
  share_key, box_key = jax.random.split(key)
  share = jax.random.beta(share_key, alpha, alpha)
  sides = jnp.floor(jnp.sqrt(1 - share) * jnp.asarray(size)).astype(jnp.int32)
  return 1.0 - boxes(box_key, sides[None], size)[0]


def boxes(key: Array, sides: Array, size: tuple[int, ...]) -> Array:
  """bool[B, H, W]: the pixels in a box around a random pixel of each image.

  `sides`, int32[B, 2], are heights and widths. A box starts sides // 2 before
  its pixel; its part beyond the edges is left out.
  """
  starts = jax.random.randint(key, sides.shape, 0, jnp.asarray([size]))
  starts = (starts - sides // 2)[..., None]
  pixels = jnp.arange(max(size))[None, None]
  is_inside = (starts <= pixels) & (pixels < starts + sides[..., None])
  return is_inside[:, 0, : size[0], None] & is_inside[:, 1, None, : size[1]]
