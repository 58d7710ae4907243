"""The train state, and the pure functions that advance and score it."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_flax.data import augment, normalize
from resnet_flax.models.kernels import grouping
from resnet_flax.optim import learning_rates, optimizers, rate_rules

PyTree = Any
# Sums over images, float32[] each, so that means are exact whatever the sizes
# of batches: those of `metric_sums` and, where they are asked for, `NORMS`.
MetricSums = dict[str, jax.Array]
# With `log.norms`: of the loss's gradient and of the weights, over all arrays.
NORMS = ("gradient_norm", "weight_norm")


class TrainState(flax.struct.PyTreeNode):
  """Everything that training carries from one step to the next."""

  step: jax.Array  # int32[], steps done.
  params: PyTree  # float32
  batch_stats: PyTree  # Running means and variances, float32.
  opt_state: PyTree  # Of the Optax chain.
  rate_state: rate_rules.RateState
  # Of the epoch so far. A checkpoint may have more or fewer of them.
  epoch_sums: MetricSums
  normalization: normalize.Normalization
  average: PyTree = None  # Averaged `variables`, where they are asked for.

  @property
  def variables(self) -> dict[str, PyTree]:
    """What `model.apply` takes."""
    return {"params": self.params, "batch_stats": self.batch_stats}


class StepMetrics(flax.struct.PyTreeNode):
  """What one training step reports."""

  step: jax.Array  # int32[], 0-based.
  sums: MetricSums  # Of the epoch so far, this step included.
  learning_rate: jax.Array  # float32[], used by this step.
  finite: jax.Array  # bool[]: the objective and the new state are.


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The fixed parts of an experiment, which the steps close over."""

  model: nn.Module  # Called as model.apply(variables, images, train=...).
  optimizer: optimizers.Optimizer
  learning_rate: learning_rates.LearningRate
  augment: augment.Augment  # Maps (key, images, targets) to the last two.
  image_shape: tuple[int, int, int]  # (H, W, C)
  num_classes: int  # Of the network's head.
  # Share of each label that goes to all classes alike in training (Szegedy et
  # al. 2015, section 7).
  label_smoothing: float = 0.0
  # Maps (key, uint8[B, H, W, C], epoch) to images, before normalisation.
  augment_bytes: Callable[..., jax.Array] = lambda key, images, epoch: images
  log_norms: bool = False  # Whether training sums `NORMS`, too.
  # The average of a state whose own is of the step before; `averaging.create`.
  average: Callable[[TrainState], PyTree] = lambda state: None


# ---- The train state


def create_train_state(
  experiment: Experiment,
  key: jax.Array,
  normalization: normalize.Normalization,
) -> TrainState:
  """The state before the first step, with parameters drawn from key[].

  Under `jax.jit` a deep network's would take minutes to compile.
  """
  images = jax.ShapeDtypeStruct((1, *experiment.image_shape), jnp.float32)
  # Draws the parameters without running the network.
  variables = experiment.model.lazy_init(key, images, train=False)
  return state_of(experiment, variables, normalization)


def state_of(
  experiment: Experiment,
  variables: Mapping[str, PyTree],
  normalization: normalize.Normalization,
) -> TrainState:
  """The state before the first step of a network with given variables."""
  logits = jax.ShapeDtypeStruct((1, experiment.num_classes), jnp.float32)
  label = jax.ShapeDtypeStruct((1,), jnp.int32)
  mask = jax.ShapeDtypeStruct((1,), jnp.bool_)
  sums = jax.eval_shape(metric_sums, 0.0, 0.0, logits, label, mask)
  names = (*sums, *NORMS * experiment.log_norms)
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables["params"],
    # Networks without batch norm have none.
    batch_stats=variables.get("batch_stats", {}),
    opt_state=experiment.optimizer.tx.init(variables["params"]),
    rate_state=experiment.learning_rate.rules.init(),
    epoch_sums={name: jnp.zeros((), jnp.float32) for name in names},
    normalization=normalization,
  )
  return state.replace(average=experiment.average(state))


# ---- Loss and metrics


def cross_entropy(
  logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
  """The cross-entropy of each image, float32[B].

  Targets are int32[B] labels or float[B, classes] probabilities.
  """
  if targets.ndim == 1 and not label_smoothing:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  if targets.ndim == 1:
    targets = jax.nn.one_hot(targets, logits.shape[-1])
  if label_smoothing:
    targets = optax.smooth_labels(targets, label_smoothing)
  return optax.softmax_cross_entropy(logits, targets)


def in_top5(scores: Any, labels: Any) -> Any:
  """Whether labels are among the 5 first of scores, [B, classes]: bool[B]."""
  # Without a sort, for which devices would gather their images' scores.
  classes, labels = np.arange(scores.shape[-1])[None], labels[:, None]
  own = scores.max(-1, where=classes == labels, initial=-np.inf, keepdims=True)
  after = (scores < own) | ((scores == own) & (classes >= labels))
  return (~after).sum(axis=-1) < 5  # Of NaN, none is after.


def metric_sums(
  loss: jax.Array,
  objective: jax.Array,
  logits: jax.Array,
  labels: jax.Array,
  mask: jax.Array,
) -> MetricSums:
  """The metrics of a batch, in training and in evaluation.

  Each entry is a sum over the images that `mask`, bool[B], lets count; its mean
  is recorded and drawn for every split under its name. `loss` is the sum of
  cross-entropies, `objective` the same with the L2 term. Labels are those of
  the data, whatever targets an augmentation made of them.
  """
  sums = {
    "loss": loss,
    "objective": objective,
    "accuracy": jnp.sum((jnp.argmax(logits, axis=-1) == labels) & mask),
    "count": jnp.sum(mask),
  }
  if logits.shape[-1] >= 10:
    sums["top5"] = jnp.sum(in_top5(logits, labels) & mask)
  return {name: jnp.asarray(x, jnp.float32) for name, x in sums.items()}


# ---- Training


def step_keys(key: jax.Array, step: jax.Array | int) -> dict[str, jax.Array]:
  """The key[] of a 0-based step for 'augmentation', and for 'dropout'."""
  # No step has this number.
  dropout_key = jax.random.fold_in(key, 2**32 - 1)
  return {
    "augmentation": jax.random.fold_in(key, step),
    "dropout": jax.random.fold_in(dropout_key, step),
  }


def loss_fn(
  experiment: Experiment,
  params: PyTree,
  batch_stats: PyTree,
  images: jax.Array,
  targets: jax.Array,
  dropout_key: jax.Array,
  collections: Sequence[str] = (),
) -> tuple[jax.Array, tuple[jax.Array, Mapping[str, PyTree]]]:
  """The mean cross-entropy of a normalised and augmented batch, float32[].

  With float32[B, classes] logits and the collections that modules wrote, which
  are 'batch_stats' and, where they have them, `collections`.
  """
  logits, updated = experiment.model.apply(
    {"params": params, "batch_stats": batch_stats},
    images,
    train=True,
    mutable=["batch_stats", *collections],
    rngs={"dropout": dropout_key},
  )
  losses = cross_entropy(logits, targets, experiment.label_smoothing)
  return jnp.mean(losses), (logits, updated)


def train_step(
  experiment: Experiment,
  state: TrainState,
  images: jax.Array,
  labels: jax.Array,
  key: jax.Array,
) -> tuple[TrainState, StepMetrics]:
  """One step: normalise, augment, differentiate, update.

  Images are uint8[B, H, W, C], labels int32[B]; `key`, key[], is the same at
  every step, whose number is folded in here.
  """
  return train_step_with_backward(experiment, state, images, labels, key)[:2]


def train_step_with_backward(
  experiment: Experiment,
  state: TrainState,
  images: jax.Array,
  labels: jax.Array,
  key: jax.Array,
  collections: Sequence[str] = (),
) -> tuple[TrainState, StepMetrics, PyTree, Mapping[str, PyTree]]:
  """`train_step`, the gradient of its loss and the collections it wrote."""
  keys = step_keys(key, state.step)
  epoch = state.step // experiment.learning_rate.steps_per_epoch
  images = experiment.augment_bytes(keys["augmentation"], images, epoch)
  # In the recipe's order: the shift fills edges with normalised pixels.
  images, targets = experiment.augment(
    keys["augmentation"], state.normalization(images), labels
  )

  # Forward and backward.
  grad_fn = jax.value_and_grad(loss_fn, argnums=1, has_aux=True)
  (loss, (logits, updated)), grads = grad_fn(
    experiment,
    state.params,
    state.batch_stats,
    images,
    targets,
    keys["dropout"],
    collections,
  )
  batch_stats = updated.get("batch_stats", {})

  # Update.
  rate = experiment.learning_rate(state.step, state.rate_state)
  params, opt_state = experiment.optimizer.update(
    grads, state.opt_state, state.params, rate
  )

  # Metrics: the first step of an epoch starts the sums anew.
  objective = loss + experiment.optimizer.penalty(state.params)
  count = labels.shape[0]
  sums = metric_sums(
    loss * count, objective * count, logits, labels, jnp.ones(count, bool)
  )
  if experiment.log_norms:
    trees = zip(NORMS, (grads, state.params), strict=True)
    sums |= {name: count * grouping.norm(tree) for name, tree in trees}
  error, rules = 1 - sums["accuracy"] / count, experiment.learning_rate.rules
  starts = state.step % experiment.learning_rate.steps_per_epoch == 0
  sums = jax.tree.map(
    lambda old, new: jnp.where(starts, new, old + new), state.epoch_sums, sums
  )
  new_state = state.replace(
    step=state.step + 1,
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    rate_state=rules.after_step(state.rate_state, error),
    epoch_sums=sums,
  )
  new_state = new_state.replace(average=experiment.average(new_state))
  floats = [
    leaf
    for leaf in jax.tree.leaves((objective, params, batch_stats, opt_state))
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  ]
  finite = grouping.reduce_each(lambda x: jnp.all(jnp.isfinite(x)), floats)
  metrics = StepMetrics(state.step, sums, rate, jnp.all(finite))
  return new_state, metrics, grads, updated


# ---- Evaluation


def apply_eval(
  model: nn.Module, state: TrainState, images: jax.Array
) -> jax.Array:
  """float32[B, classes] logits of uint8[B, H, W, C] images, inference mode."""
  images = state.normalization(images)
  logits = model.apply(state.variables, images, train=False)
  assert isinstance(logits, jax.Array)  # No collection is mutable here.
  return logits


def eval_step(
  experiment: Experiment,
  state: TrainState,
  images: jax.Array,
  labels: jax.Array,
  mask: jax.Array,
) -> tuple[MetricSums, jax.Array]:
  """Scores a batch in inference mode.

  Images are uint8[B, H, W, C], or uint8[B, crops, H, W, C], several crops of
  each, whose probabilities are averaged; labels are int32[B]; the mask,
  bool[B], is False for padding. Returns `metric_sums` and the float32[B,
  classes] probabilities.
  """
  crops = images.reshape(-1, *images.shape[-3:])
  logits = apply_eval(experiment.model, state, crops)
  if images.ndim == 5:
    log_probabilities = jax.nn.log_softmax(
      logits.reshape(*images.shape[:2], logits.shape[-1])
    )
    # The logarithm of their mean, which is as good as logits.
    logits = jax.nn.logsumexp(log_probabilities, axis=1) - math.log(
      images.shape[1]
    )
  loss = jnp.sum(jnp.where(mask, cross_entropy(logits, labels), 0.0))
  penalty = experiment.optimizer.penalty(state.params)
  objective = loss + jnp.sum(mask, dtype=jnp.float32) * penalty
  sums = metric_sums(loss, objective, logits, labels, mask)
  return sums, jax.nn.softmax(logits)
