"""From a configuration to the fixed parts of an experiment."""

import functools

import jax
from ml_collections import ConfigDict

from resnet_flax import models, optimizer, schedule, step as train_step
from resnet_flax.data import (
  augment,
  loading,
  normalize as normalization,
  randomness,
)


def build(config: ConfigDict) -> train_step.Experiment:
  """Builds model, optimizer, schedule and augmentation; loads no data.

  Args:
    config: a configuration that `rules.check` has passed.
  """
  info = loading.info(config.dataset)
  num_train = loading.num_train_examples(config.dataset)
  # The last, smaller batch is dropped; every epoch drops other images.
  steps_per_epoch = num_train // config.batch_size
  return train_step.Experiment(
    model=models.create_model(config.model, num_classes(config)),
    optimizer=optimizer.create_optimizer(config.optimizer),
    learning_rate=schedule.create_learning_rate(config, steps_per_epoch),
    augment=augment.create_augment(config.augment),
    image_shape=info.image_shape,
    label_smoothing=config.label_smoothing,
  )


def num_classes(config: ConfigDict) -> int:
  """The size of the network's head."""
  return config.model.num_classes or loading.info(config.dataset).num_classes


def abstract_state(
  config: ConfigDict, experiment: train_step.Experiment
) -> train_step.TrainState:
  """The shapes and dtypes of the train state; computes nothing.

  Args:
    config: what the experiment was built from.
    experiment: the fixed parts.

  Returns:
    A `TrainState` of `jax.ShapeDtypeStruct`s; with several seeds as a
    checkpoint has it, [seeds, ...].
  """
  one = jax.eval_shape(
    functools.partial(train_step.create_train_state, experiment),
    randomness.device_key(config.seed, randomness.Purpose.INITIALIZATION),
    normalization.placeholder(config.normalization, experiment.image_shape),
  )
  if config.num_seeds == 1:
    return one
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      (config.num_seeds, *leaf.shape), leaf.dtype
    ),
    one,
  )
