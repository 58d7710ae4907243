"""Measures the size of activations, gradients and updates in each layer.

If these vanish or explode from layer to layer, a network is too deep to train
(Glorot and Bengio 2010, He et al. 2015, section 1).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from resnet_flax import step as step_lib
from resnet_flax.models.kernels import grouping
from resnet_flax.parallel import networks, program
from resnet_flax.run import metrics

# The Flax collection for the norms that the forward pass measures.
_COLLECTION = "layer_norms"
_LAYER = nn.Conv | nn.Dense  # The modules with kernels.


class LayerNorms(flax.struct.PyTreeNode):
  """The norms of L layers, in the order of `layer_names`: float32[L] each."""

  # Frobenius norm of the gradient of the batch's mean cross-entropy, without
  # the L2 term, with respect to the layer's kernel.
  gradient: jax.Array
  # Root mean square of the layer's outputs over images, pixels and channels:
  # with its bias, before normalisation, residual sum and activation function,
  # in training mode.
  activation: jax.Array
  # Frobenius norm of the change that the optimizer's step makes to the kernel,
  # L2 term included, divided by the kernel's norm before the step.
  update_ratio: jax.Array


def layer_names(experiment: step_lib.Experiment) -> tuple[str, ...]:
  """The layers that have kernels, in the order of the forward pass.

  For example 'stem_conv', 'stage1_block1/conv1', ..., 'head'.
  """
  images = jnp.zeros((1, *experiment.image_shape))
  modules = experiment.model.module_paths(
    jax.random.key(0), images, train=False
  )
  return tuple(k for k, module in modules.items() if isinstance(module, _LAYER))


def create_hook(
  config: ConfigDict,
  experiment: step_lib.Experiment,
  state: networks.Networks,
  key: networks.Networks,
  layout: networks.Layout,
  write: Callable[[int, Mapping[str, float]], None],
) -> Callable[[int, networks.Networks, program.Batch], None]:
  """The loop's hook before a step; `log_layer_norms_every` says when it writes.

  Only the shapes of `state` are used. `key` is the augmentation key[] of each
  network. `write` takes the step and the numbers by their tags.
  """
  if not config.log_layer_norms_every:
    return lambda *_: None
  names = layer_names(experiment)
  measure = program.compile_function(
    "measurement of layer norms",
    lambda *arguments: measured_step(experiment, *arguments)[2:],
    layout,
    program.step_arguments(experiment, state, config.batch_size, key, layout),
  )

  def hook(step: int, state: networks.Networks, batch: program.Batch) -> None:
    if step % config.log_layer_norms_every:
      return
    (norms,) = measure(state, *batch.images_and_labels(), key)
    for seed, seed_norms in zip(layout.seeds, layout.get(norms), strict=True):
      values = scalars(names, seed_norms)
      if len(layout.seeds) > 1:
        values = {metrics.seed_tag(seed, tag): v for tag, v in values.items()}
      write(step, values)

  return hook


def measured_step(
  experiment: step_lib.Experiment,
  state: step_lib.TrainState,
  images: jax.Array,
  labels: jax.Array,
  key: jax.Array,
) -> tuple[step_lib.TrainState, step_lib.StepMetrics, LayerNorms]:
  """`step.train_step` that also returns the layers' norms in this step."""
  with nn.intercept_methods(_store_output_rms):
    new_state, step_metrics, grads, collections = (
      step_lib.train_step_and_gradient(
        experiment, state, images, labels, key, collections=[_COLLECTION]
      )
    )
  layers = layer_names(experiment)

  def of_layers(tree: Mapping[str, Any], name: str) -> list[jax.Array]:
    flat = traverse_util.flatten_dict(tree, sep="/")
    return [flat[f"{layer}/{name}"] for layer in layers]

  kernels = of_layers(state.params, "kernel")
  new_kernels = of_layers(new_state.params, "kernel")
  changes = [new - old for new, old in zip(new_kernels, kernels, strict=True)]
  norms = LayerNorms(
    gradient=grouping.reduce_each(grouping.norm_of, of_layers(grads, "kernel")),
    activation=jnp.stack(of_layers(collections[_COLLECTION], "activation")),
    update_ratio=grouping.reduce_each(grouping.norm_of, changes)
    / grouping.reduce_each(grouping.norm_of, kernels),
  )
  return new_state, step_metrics, norms


def _store_output_rms(next_call, args, kwargs, context):
  outputs = next_call(*args, **kwargs)
  if isinstance(context.module, _LAYER) and context.method_name == "__call__":
    (norm,) = grouping.reduce_each(
      grouping.norm_of, [jax.lax.stop_gradient(outputs)]
    )
    rms = norm / math.sqrt(outputs.size)
    context.module.put_variable(_COLLECTION, "activation", rms)
  return outputs


def scalars(names: tuple[str, ...], norms: LayerNorms) -> dict[str, float]:
  """The norms by their tags, such as 'layers/gradient/stem_conv'."""
  return {
    f"layers/{kind}/{name}": float(value)
    for kind in ("gradient", "activation", "update_ratio")
    for name, value in zip(names, getattr(norms, kind), strict=True)
  }
