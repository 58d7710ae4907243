"""Changes to a block's branch before it is added to the shortcut."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_flax.models.blocks import Context, ModuleDef


class Branch(nn.Module):
  """Squeeze-and-excitation, then stochastic depth; 0 turns either off.

  Squeeze-and-excitation: Hu et al. 2018 (arXiv:1709.01507, section 3); both
  dense layers have a bias. Stochastic depth: Huang et al. 2016
  (arXiv:1603.09382, section 3), with the linear rule. Training drops the branch
  of block l of L for a whole batch with probability stochastic_depth * l / L.
  Inference multiplies the branch by its survival probability. The batch norms
  of a dropped branch still update their running statistics.
  """

  squeeze_excitation: int  # Reduction ratio: channels / hidden units.
  stochastic_depth: float  # Drop probability of the last block's branch.
  dense: ModuleDef
  train: bool

  @nn.compact
  def __call__(self, y: jax.Array, context: Context) -> jax.Array:
    """Maps float[B, H, W, C] to the same shape."""
    if self.squeeze_excitation:
      hidden = max(y.shape[-1] // self.squeeze_excitation, 1)
      gates = self.dense(hidden, name="squeeze")(jnp.mean(y, axis=(1, 2)))
      gates = self.dense(y.shape[-1], name="excite")(nn.relu(gates))
      y = y * nn.sigmoid(gates)[:, None, None]
    if self.stochastic_depth:
      assert context.fraction is not None
      survival = 1 - self.stochastic_depth * context.fraction
      if self.train:
        assert context.key is not None
        return jnp.where(jax.random.bernoulli(context.key, survival), y, 0)
      y = (survival * y).astype(y.dtype)
    return y
