"""The recipe's network and training step in stock Flax and Optax."""

import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.throughput.workers import measure

_THREADS = pathlib.Path("/proc/self/task")
_he_normal = nn.initializers.he_normal()
_conv = functools.partial(nn.Conv, kernel_init=_he_normal)
# Its first argument is `use_running_average`.
_norm = functools.partial(nn.BatchNorm, momentum=0.99, epsilon=1e-3)


class Block(nn.Module):
  """conv-BN-ReLU, conv-BN, add, ReLU."""

  filters: int
  strides: int

  @nn.compact
  def __call__(self, x, train):
    """Maps float[B, H, W, C] to the block's output."""
    y = _conv(self.filters, (3, 3), self.strides)(x)
    y = nn.relu(_norm(not train)(y))
    y = _conv(self.filters, (3, 3))(y)
    y = _norm(not train)(y)
    if x.shape != y.shape:
      x = _conv(self.filters, (1, 1), self.strides)(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """ResNet v1 with `blocks` blocks in each of three stages."""

  blocks: int

  @nn.compact
  def __call__(self, x, train):
    """Maps float[B, 32, 32, 3] images to float[B, 10] logits."""
    x = _conv(16, (3, 3))(x)
    x = nn.relu(_norm(not train)(x))
    for stage in range(3):
      for block in range(self.blocks):
        strides = 2 if stage > 0 and block == 0 else 1
        x = Block(16 * 2**stage, strides)(x, train)
    x = jnp.mean(x, axis=(1, 2))
    return nn.Dense(measure.NUM_CLASSES, kernel_init=_he_normal)(x)


def loss_fn(params, batch_stats, model, images, labels):
  """Cross-entropy and L2 of the convolution kernels, in training mode."""
  logits, updated = model.apply(
    {"params": params, "batch_stats": batch_stats},
    images,
    train=True,
    mutable=["batch_stats"],
  )
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
  l2 = sum(jnp.sum(w**2) for w in jax.tree.leaves(params) if w.ndim == 4)
  return loss + 1e-4 * l2, (loss, logits, updated["batch_stats"])


class Program:
  """Trains and predicts on one batch that stays on the device."""

  libraries = ("jax", "jaxlib", "flax", "optax", "numpy")

  def __init__(self, task: measure.Task):
    images, labels = task.batch()
    self._images = jnp.asarray(images, jnp.float32) / 255
    self._labels = jnp.asarray(labels)
    self._model = ResNet(task.blocks)

  def build(self):
    """Initialises the network and jits a training step."""
    variables = jax.jit(functools.partial(self._model.init, train=False))(
      jax.random.key(0), self._images
    )
    tx = optax.adam(1e-3, eps=1e-7)
    self._state = (
      variables["params"],
      variables["batch_stats"],
      tx.init(variables["params"]),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, images, labels):
      params, batch_stats, opt_state = state
      grads, (loss, logits, batch_stats) = jax.grad(loss_fn, has_aux=True)(
        params, batch_stats, self._model, images, labels
      )
      updates, opt_state = tx.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
      accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
      return (params, batch_stats, opt_state), loss, accuracy

    @jax.jit
    def logits(params, batch_stats, images):
      variables = {"params": params, "batch_stats": batch_stats}
      return self._model.apply(variables, images, train=False)

    def train(steps: int) -> float:
      for _ in range(steps):
        self._state, loss, accuracy = train_step(
          self._state, self._images, self._labels
        )
      jax.block_until_ready((self._state, loss, accuracy))
      return float(loss)

    def infer(steps: int) -> None:
      params, batch_stats, _ = self._state
      for _ in range(steps):
        result = logits(params, batch_stats, self._images)
      jax.block_until_ready(result)

    return {"train": train, "infer": infer}

  def facts(self) -> dict[str, Any]:
    """Facts from JAX; see the function `facts`."""
    images = np.rint(np.asarray(self._images) * 255)
    return facts(self._state[0], images, np.asarray(self._labels))


def facts(params, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
  """Facts from JAX: parameters, batch, threads. Pixels are from 0 to 255."""
  # JAX does not report its threads, but on Linux they have names.
  names = [p.read_text() for p in _THREADS.glob("*/comm")]
  return {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "batch": measure.digest(images, labels),
    "threads": sum("XLAEigen" in name for name in names),
  }


def matmul(steps: int) -> None:
  """Multiplies two float32 matrices `steps` times."""
  size = measure.MATMUL_SIZE
  a = jnp.ones((size, size), jnp.float32)
  for _ in range(steps):
    product = jnp.matmul(a, a)
  jax.block_until_ready(product)


if __name__ == "__main__":
  measure.serve(Program)
