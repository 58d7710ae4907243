"""Builds the fixed parts of an experiment from its configuration."""

import functools

import jax
from ml_collections import ConfigDict

from resnet_flax import step as step_lib
from resnet_flax.data import (
  augment,
  augment_bytes,
  dataset,
  normalize,
  randomness,
  types,
)
from resnet_flax.models import registry
from resnet_flax.optim import learning_rates, optimizers
from resnet_flax.parallel import averaging


def build(
  config: ConfigDict, facts: types.Facts | None = None
) -> step_lib.Experiment:
  """Builds model, optimizer, schedule and augmentation; loads no data."""
  # Every epoch drops its last, smaller batch: different images each time.
  num_train = dataset.num_train_examples(config.dataset, facts)
  steps_per_epoch = num_train // config.batch_size
  info = dataset.info(config.dataset, facts)
  classes = config.model.num_classes or info.num_classes
  return step_lib.Experiment(
    model=registry.create_model(config.model, classes),
    optimizer=optimizers.create_optimizer(config.optimizer),
    learning_rate=learning_rates.create_learning_rate(config, steps_per_epoch),
    augment=augment.create_augment(config.augment, classes),
    augment_bytes=augment_bytes.create(config.augment),
    image_shape=info.image_shape,
    num_classes=classes,
    label_smoothing=config.label_smoothing,
    log_norms=config.log.norms,
    average=averaging.create(config, steps_per_epoch),
  )


def abstract_state(
  config: ConfigDict, experiment: step_lib.Experiment
) -> step_lib.TrainState:
  """The train state as `jax.ShapeDtypeStruct`s; computes nothing.

  With several seeds the shapes are [seeds, ...], as in a checkpoint.
  """
  state = jax.eval_shape(
    functools.partial(step_lib.create_train_state, experiment),
    randomness.device_key(config.seed, randomness.Purpose.INITIALIZATION),
    normalize.placeholder(config.normalization, experiment.image_shape),
  )
  axes = (config.num_seeds,) if config.num_seeds > 1 else ()
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((*axes, *leaf.shape), leaf.dtype), state
  )
