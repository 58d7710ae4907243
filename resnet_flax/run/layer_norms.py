"""How large signal, gradient and update are in each layer.

A network is too deep to be trained where these vanish or grow without bounds on
the way through it (Glorot and Bengio 2010, He et al. 2015, section 1).
"""

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from resnet_flax import step as train_step
from resnet_flax.models.kernels import grouping as leaves

# Flax's collection for what is measured in the forward pass.
_COLLECTION = "layer_norms"


class LayerNorms(flax.struct.PyTreeNode):
  """One number for each of the `layer_names`, float32[L] each.

  Attributes:
    gradient: Frobenius norm of the gradient of the batch's mean cross-entropy,
      without the L2 term, in the layer's kernel.
    activation: root mean square of the layer's outputs over images, pixels and
      channels: with its bias, before normalisation, residual sum and
      activation function, in training mode.
    update_ratio: Frobenius norm of the change that the optimizer's step makes
      to the kernel, L2 term included, divided by the kernel's norm before.
  """

  gradient: jax.Array
  activation: jax.Array
  update_ratio: jax.Array


def layer_names(experiment: train_step.Experiment) -> tuple[str, ...]:
  """The layers that have kernels, in the order of the forward pass.

  Args:
    experiment: the fixed parts.

  Returns:
    For example 'stem_conv', 'stage1_block1/conv1', ..., 'head'; projections of
    shortcuts and gates where they are computed.
  """
  return tuple("/".join(path) for path in _paths(experiment))


def _paths(experiment: train_step.Experiment) -> list[tuple[str, ...]]:
  paths = []

  def note(next_call, args, kwargs, context):
    if _has_kernel(context):
      paths.append(context.module.path)
    return next_call(*args, **kwargs)

  with nn.intercept_methods(note):
    jax.eval_shape(
      lambda key, images: experiment.model.init(key, images, train=False),
      jax.random.key(0),
      jax.ShapeDtypeStruct((1, *experiment.image_shape), jnp.float32),
    )
  return paths


def _has_kernel(context: nn.module.InterceptorContext) -> bool:
  is_layer = isinstance(context.module, nn.Conv | nn.Dense)
  return is_layer and context.method_name == "__call__"


def measured_step(
  experiment: train_step.Experiment,
  state: train_step.TrainState,
  images: jax.Array,
  labels: jax.Array,
  key: jax.Array,
) -> tuple[train_step.TrainState, train_step.StepMetrics, LayerNorms]:
  """`train_step.train_step`, and the norms in it.

  Args:
    experiment: the fixed parts.
    state: before the step.
    images: uint8[B, H, W, C].
    labels: int32[B].
    key: key[], the same at every step; the step is folded in here.

  Returns:
    The new state, what to report, and the norms before and of the step.
  """
  with nn.intercept_methods(_note_output):
    new_state, step_metrics, computed = train_step.backpropagated_step(
      experiment, state, images, labels, key, collections=[_COLLECTION]
    )
  paths = _paths(experiment)

  def of_layers(tree: Any, name: str) -> list[jax.Array]:
    layers = []
    for path in paths:
      node = tree
      for part in path:
        node = node[part]
      layers.append(node[name])
    return layers

  before = of_layers(state.params, "kernel")
  after = of_layers(new_state.params, "kernel")
  changes = [new - old for new, old in zip(after, before, strict=True)]
  norms = LayerNorms(
    gradient=leaves.reduce_each(norm, of_layers(computed.gradient, "kernel")),
    activation=jnp.stack(
      of_layers(computed.collections[_COLLECTION], "activation")
    ),
    update_ratio=leaves.reduce_each(norm, changes)
    / leaves.reduce_each(norm, before),
  )
  return new_state, step_metrics, norms


def measure(
  experiment: train_step.Experiment,
  state: train_step.TrainState,
  images: jax.Array,
  labels: jax.Array,
  key: jax.Array,
) -> LayerNorms:
  """The norms of the step that would be taken; arguments as of the step."""
  return measured_step(experiment, state, images, labels, key)[2]


def _note_output(next_call, args, kwargs, context):
  outputs = next_call(*args, **kwargs)
  if _has_kernel(context):
    (size,) = leaves.reduce_each(norm, [jax.lax.stop_gradient(outputs)])
    context.module.sow(
      _COLLECTION,
      "activation",
      size / math.sqrt(outputs.size),
      init_fn=lambda: None,
      reduce_fn=lambda _, value: value,
    )
  return outputs


def norm(x: jax.Array) -> jax.Array:
  """The root of the sum of squares, float32[], of an array of any shape.

  Neither overflows nor vanishes where the squares would: without normalisation
  signals grow by a factor in every block.
  """
  x = x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x))
  has_scale = jnp.isfinite(largest) & (largest > 0)
  scale = jnp.where(has_scale, largest, 1.0)
  return scale * jnp.sqrt(jnp.sum(jnp.square(x / scale)))


def scalars(names: tuple[str, ...], norms: LayerNorms) -> dict[str, float]:
  """The norms by their tags, such as 'layers/gradient/stem_conv'.

  Args:
    names: from `layer_names`.
    norms: on the host.
  """
  return {
    f"layers/{kind}/{name}": float(value)
    for kind in ("gradient", "activation", "update_ratio")
    for name, value in zip(names, getattr(norms, kind), strict=True)
  }
