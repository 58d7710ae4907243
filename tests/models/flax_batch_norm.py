"""The reference for our batch norm, made of Flax's own parts."""

from collections.abc import Callable

import flax.linen as nn
import jax


class FlaxBatchNorm(nn.BatchNorm):
  """Flax's batch norm, then the residual sum and the activation."""

  act: Callable[[jax.Array], jax.Array] | None = None
  groups: int = 1  # Flax's has statistics of the whole batch only.

  def __call__(self, x, residual=None):  # type: ignore[override]
    y = super().__call__(x)
    y = y if residual is None else residual + y
    return y if self.act is None else self.act(y)
