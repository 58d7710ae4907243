"""What an experiment is, as text: nothing is loaded or compiled."""

import functools
import math
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from resnet_flax import config_rules, experiment as experiment_lib, train_step


def count_parameters(
  model: nn.Module, image_shape: tuple[int, ...]
) -> tuple[int, int]:
  """Total and trainable parameters, as Keras counts them.

  Args:
    model: a network.
    image_shape: (H, W, C).

  Returns:
    Parameters and running statistics together, and parameters alone.
  """
  variables = jax.eval_shape(
    functools.partial(model.init, train=False),
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
  )
  sizes = {
    name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(collection))
    for name, collection in variables.items()
  }
  return sum(sizes.values()), sizes["params"]


def multiply_adds(model: nn.Module, image_shape: tuple[int, ...]) -> int:
  """Multiply-adds of the convolutions and dense layers for one image.

  Analytic: output positions times kernel size, padding not subtracted; the
  count that papers call FLOPs. Normalisation, activations, additions and
  pooling are left out.

  Args:
    model: a network.
    image_shape: (H, W, C).
  """
  total = 0

  def count(next_call, args, kwargs, context):
    nonlocal total
    result = next_call(*args, **kwargs)
    if context.method_name == "__call__" and isinstance(
      context.module, nn.Conv | nn.Dense
    ):
      kernel = context.module.variables["params"]["kernel"]
      # The kernel's last axis are the outputs' channels, counted already.
      total += math.prod(result.shape) * math.prod(kernel.shape[:-1])
    return result

  with nn.intercept_methods(count):
    jax.eval_shape(
      functools.partial(model.init, train=False),
      jax.random.key(0),
      jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),
    )
  return total


def summarize(config: ConfigDict) -> str:
  """The network as a table, its size, its optimizer and its schedule.

  Args:
    config: every key of `configs/base.py`.

  Raises:
    ConfigError: a value that cannot be used.
  """
  config_rules.check(config, num_devices=1)
  experiment = experiment_lib.build(config)
  table = _table(experiment).strip()
  return "\n".join([table, *_facts(config, experiment)])


def _table(experiment: train_step.Experiment) -> str:
  return nn.tabulate(
    experiment.model,
    jax.random.key(0),
    depth=2,
    console_kwargs={
      "width": max(shutil.get_terminal_size((160, 0)).columns, 120),
      "force_terminal": False,
    },
  )(jnp.zeros((1, *experiment.image_shape)), train=False)


def _facts(config: ConfigDict, experiment: train_step.Experiment) -> list[str]:
  total, trainable = count_parameters(experiment.model, experiment.image_shape)
  flops = 2 * multiply_adds(experiment.model, experiment.image_shape)
  steps = experiment.learning_rate.steps_per_epoch
  return [
    f"Model: {config.model.name}, depth {config.model.depth}",
    f"Total parameters: {total:,}",
    f"Trainable parameters: {trainable:,}",
    f"Forward FLOPs per image: {flops:,}",
    "Optimizer:",
    *(f"  {link}" for link in experiment.optimizer.links),
    f"Learning rate, by 0-based epoch ({config.num_epochs} epochs of"
    f" {steps} steps):",
    *(f"  {line}" for line in experiment.learning_rate.describe()),
  ]
