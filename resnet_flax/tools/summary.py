"""Describes an experiment as text; nothing is loaded or compiled."""

import functools
import shutil
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from resnet_flax.run import experiment as experiment_lib, rules


class Size(NamedTuple):
  """How large a network is."""

  total: int  # Parameters and running statistics together, as Keras counts.
  trainable: int  # Parameters alone.
  # For one image. Only convolutions and dense layers count: each one's output
  # positions times its kernel size, padding included. Papers call this FLOPs.
  multiply_adds: int


def measure_size(model: nn.Module, image_shape: tuple[int, ...]) -> Size:
  """The size of a network, counted from traced shapes: nothing is computed."""
  multiply_adds = 0

  def count(next_call, args, kwargs, context):
    nonlocal multiply_adds
    result = next_call(*args, **kwargs)
    if context.method_name == "__call__" and isinstance(
      context.module, nn.Conv | nn.Dense
    ):
      kernel = context.module.variables["params"]["kernel"]
      # The kernel's last axis, the output channels, is in result.size already.
      multiply_adds += result.size * kernel.size // kernel.shape[-1]
    return result

  with nn.intercept_methods(count):
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), image)
  sizes = jax.tree.map(lambda leaf: leaf.size, variables)
  total = sum(jax.tree.leaves(sizes))
  return Size(total, sum(jax.tree.leaves(sizes["params"])), multiply_adds)


def summarize(config: ConfigDict) -> str:
  """Lists the network's layers and size, its optimizer and its schedule."""
  rules.check(config, num_devices=1)
  experiment = experiment_lib.build(config)
  width = max(shutil.get_terminal_size((160, 0)).columns, 120)
  console = {"width": width, "force_terminal": False}
  tabulate = nn.tabulate(
    experiment.model, jax.random.key(0), depth=2, console_kwargs=console
  )
  table = tabulate(jnp.zeros((1, *experiment.image_shape)), train=False)
  size = measure_size(experiment.model, experiment.image_shape)
  lines = [
    table.strip(),
    f"Model: {config.model.name}, depth {config.model.depth}",
    f"Total parameters: {size.total:,}",
    f"Trainable parameters: {size.trainable:,}",
    f"Forward FLOPs per image: {2 * size.multiply_adds:,}",
    "Optimizer:",
    *(f"  {link}" for link in experiment.optimizer.links),
    f"Learning rate, by 0-based epoch ({config.num_epochs} epochs of"
    f" {experiment.learning_rate.steps_per_epoch} steps):",
    *(f"  {line}" for line in experiment.learning_rate.describe()),
  ]
  return "\n".join(lines)
