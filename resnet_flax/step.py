"""The train state and the pure functions that advance and score it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from resnet_flax import optimizer, schedule
from resnet_flax.data import augment
from resnet_flax.models.kernels import grouping as leaves

PyTree = Any


class Normalization(flax.struct.PyTreeNode):
  """What is done to images / 255: subtract `mean`, divide by `std`.

  Part of the train state, so that a checkpoint can score images by itself.
  Both are float32 and broadcast against [H, W, C].
  """

  mean: jax.Array
  std: jax.Array

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps uint8[B, H, W, C] to float32[B, H, W, C]."""
    images = images.astype(jnp.float32) / 255
    return (images - self.mean[None]) / self.std[None]


class MetricSums(flax.struct.PyTreeNode):
  """Sums over images, so that means are exact whatever the batch sizes.

  Attributes:
    loss: float32[], cross-entropy.
    objective: float32[], cross-entropy plus the L2 term.
    correct: int32[], images whose highest logit is their label.
    count: int32[], images.
  """

  loss: jax.Array
  objective: jax.Array
  correct: jax.Array
  count: jax.Array

  @classmethod
  def zeros(cls) -> "MetricSums":
    """The sums over no image."""
    return cls(
      loss=jnp.zeros((), jnp.float32),
      objective=jnp.zeros((), jnp.float32),
      correct=jnp.zeros((), jnp.int32),
      count=jnp.zeros((), jnp.int32),
    )


class TrainState(flax.struct.PyTreeNode):
  """Everything that training carries from one step to the next.

  Attributes:
    step: int32[], steps done.
    params: the network's parameters, float32.
    batch_stats: running means and variances of batch normalisation, float32.
    opt_state: state of the Optax chain.
    rate_state: what the learning rate depends on besides the step.
    epoch_sums: training metrics of the epoch so far.
    normalization: applied to images before the network sees them.
  """

  step: jax.Array
  params: PyTree
  batch_stats: PyTree
  opt_state: PyTree
  rate_state: schedule.RateState
  epoch_sums: MetricSums
  normalization: Normalization


class StepMetrics(flax.struct.PyTreeNode):
  """What one training step reports.

  Attributes:
    step: int32[], its number, 0-based.
    sums: of the epoch so far, this step included.
    learning_rate: float32[], used by this step.
    finite: bool[], whether the objective and the new state are.
  """

  step: jax.Array
  sums: MetricSums
  learning_rate: jax.Array
  finite: jax.Array


class Backpropagated(NamedTuple):
  """What a step computed on its way.

  Attributes:
    gradient: of the mean cross-entropy, like the parameters.
    collections: what the network's modules wrote into Flax's collections.
  """

  gradient: PyTree
  collections: Mapping[str, PyTree]


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The fixed parts of an experiment, which the steps close over.

  Attributes:
    model: called as `model.apply(variables, images, train=...)`.
    optimizer: the Optax chain and its L2 term.
    learning_rate: the rate as a function of step and rate state.
    augment: function of (key, normalised images).
    image_shape: (H, W, C) of one image.
    label_smoothing: share of each label that goes to all classes alike while
      training (Szegedy et al. 2015, section 7).
  """

  model: nn.Module
  optimizer: optimizer.Optimizer
  learning_rate: schedule.LearningRate
  augment: augment.Augment
  image_shape: tuple[int, int, int]
  label_smoothing: float = 0.0


def create_train_state(
  experiment: Experiment, key: jax.Array, normalization: Normalization
) -> TrainState:
  """The state before the first step.

  Called outside of `jax.jit` it compiles each shape's initializer once, whereas
  a program of all of them takes a deep network minutes to compile.

  Args:
    experiment: the fixed parts.
    key: key[], draws the initial parameters.
    normalization: measured on the training split.
  """
  images = jax.ShapeDtypeStruct((1, *experiment.image_shape), jnp.float32)
  # Draws the parameters without running the network.
  variables = experiment.model.lazy_init(key, images, train=False)
  return state_of(experiment, variables, normalization)


def state_of(
  experiment: Experiment,
  variables: Mapping[str, PyTree],
  normalization: Normalization,
) -> TrainState:
  """The state before the first step, of a network with given variables.

  Args:
    experiment: the fixed parts.
    variables: its 'params' and, where it has batch norms, 'batch_stats'.
    normalization: measured on the training split, or fixed.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables["params"],
    # Networks without batch norm have none.
    batch_stats=variables.get("batch_stats", {}),
    opt_state=experiment.optimizer.tx.init(variables["params"]),
    rate_state=experiment.learning_rate.init(),
    epoch_sums=MetricSums.zeros(),
    normalization=normalization,
  )


def loss_fn(
  model: nn.Module,
  params: PyTree,
  batch_stats: PyTree,
  images: jax.Array,
  labels: jax.Array,
  dropout_key: jax.Array,
  collections: Sequence[str] = (),
  label_smoothing: float = 0.0,
) -> tuple[jax.Array, tuple[jax.Array, Mapping[str, PyTree]]]:
  """The mean cross-entropy of a batch, in training mode.

  Args:
    model: the network.
    params: its parameters.
    batch_stats: running statistics before the batch.
    images: float32[B, H, W, C], normalised and augmented.
    labels: int32[B].
    dropout_key: key[], for networks that drop units.
    collections: what modules may write to besides 'batch_stats'.
    label_smoothing: see `Experiment`.

  Returns:
    float32[] loss, and (float32[B, classes] logits, the collections that were
    written, new running statistics among them).
  """
  logits, updated = model.apply(
    {"params": params, "batch_stats": batch_stats},
    images,
    train=True,
    mutable=["batch_stats", *collections],
    rngs={"dropout": dropout_key},
  )
  if label_smoothing:
    one_hot = jax.nn.one_hot(labels, logits.shape[-1])
    smoothed = optax.smooth_labels(one_hot, label_smoothing)
    losses = optax.softmax_cross_entropy(logits, smoothed)
  else:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return jnp.mean(losses), (logits, updated)


def step_keys(key: jax.Array, step: jax.Array | int) -> dict[str, jax.Array]:
  """What a step draws from: a key[] for 'augmentation', one for 'dropout'.

  Args:
    key: key[], the same at every step.
    step: the number of steps before it.
  """
  # No step has this number.
  dropout_key = jax.random.fold_in(key, 2**32 - 1)
  return {
    "augmentation": jax.random.fold_in(key, step),
    "dropout": jax.random.fold_in(dropout_key, step),
  }


def train_step(
  experiment: Experiment,
  state: TrainState,
  images: jax.Array,
  labels: jax.Array,
  key: jax.Array,
) -> tuple[TrainState, StepMetrics]:
  """One step: normalise, augment, differentiate, update.

  Args:
    experiment: the fixed parts.
    state: before the step.
    images: uint8[B, H, W, C].
    labels: int32[B].
    key: key[], the same at every step; the step is folded in here.

  Returns:
    The new state and what to report.
  """
  return backpropagated_step(experiment, state, images, labels, key)[:2]


def backpropagated_step(
  experiment: Experiment,
  state: TrainState,
  images: jax.Array,
  labels: jax.Array,
  key: jax.Array,
  collections: Sequence[str] = (),
) -> tuple[TrainState, StepMetrics, Backpropagated]:
  """One step, with what it computed on its way.

  Args:
    experiment: the fixed parts.
    state: before the step.
    images: uint8[B, H, W, C].
    labels: int32[B].
    key: key[], the same at every step; the step is folded in here.
    collections: what the network's modules may write to.

  Returns:
    The new state, what to report, and the gradient and collections.
  """
  # In the recipe's order: the shift fills edges with normalised pixels.
  images = state.normalization(images)
  keys = step_keys(key, state.step)
  images = experiment.augment(keys["augmentation"], images)

  grad_fn = jax.value_and_grad(loss_fn, argnums=1, has_aux=True)
  (loss, (logits, updated)), grads = grad_fn(
    experiment.model,
    state.params,
    state.batch_stats,
    images,
    labels,
    keys["dropout"],
    collections,
    experiment.label_smoothing,
  )
  batch_stats = updated.get("batch_stats", {})
  rate = experiment.learning_rate(state.step, state.rate_state)
  params, opt_state = experiment.optimizer.update(
    grads, state.opt_state, state.params, rate
  )

  objective = loss + experiment.optimizer.penalty(state.params)
  count = labels.shape[0]
  correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.int32)
  batch_sums = MetricSums(
    loss=loss * count,
    objective=objective * count,
    correct=correct,
    count=jnp.asarray(count, jnp.int32),
  )
  # The first step of an epoch starts the sums anew.
  starts = state.step % experiment.learning_rate.steps_per_epoch == 0
  sums = jax.tree.map(
    lambda old, new: jnp.where(starts, new, old + new),
    state.epoch_sums,
    batch_sums,
  )
  new_state = state.replace(
    step=state.step + 1,
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    rate_state=experiment.learning_rate.after_step(
      state.rate_state, 1 - correct / count
    ),
    epoch_sums=sums,
  )
  finite = _all_finite((objective, params, batch_stats, opt_state))
  return (
    new_state,
    StepMetrics(state.step, sums, rate, finite),
    Backpropagated(grads, updated),
  )


def train_steps(
  experiment: Experiment,
  state: TrainState,
  order: jax.Array,
  key: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  num_steps: jax.Array,
) -> tuple[TrainState, StepMetrics]:
  """Several steps of one epoch, each as `train_step` does it.

  How many is not part of the program, so that where calls end changes no bit.

  Args:
    experiment: the fixed parts.
    state: before the first of them.
    order: int32[B, steps per epoch], positions in the split of each batch.
    key: key[], the same at every step.
    images: uint8[M, H, W, C], the training split.
    labels: int32[M].
    num_steps: int32[], at least one.

  Returns:
    The new state, and what the last step has to report, or the first whose
    result is not finite.
  """
  steps_per_epoch = experiment.learning_rate.steps_per_epoch

  def one(_, carry: tuple[TrainState, StepMetrics]):
    state, reported = carry
    positions = jnp.take(order, state.step % steps_per_epoch, axis=1)
    state, new = train_step(
      experiment, state, images[positions], labels[positions], key
    )
    reported = jax.tree.map(
      lambda old, new: jnp.where(reported.finite, new, old), reported, new
    )
    return state, reported

  nothing = StepMetrics(
    step=state.step,
    sums=state.epoch_sums,
    learning_rate=jnp.zeros((), jnp.float32),
    finite=jnp.asarray(True),
  )
  return jax.lax.fori_loop(0, num_steps, one, (state, nothing))


def _all_finite(tree: PyTree) -> jax.Array:
  floats = [
    leaf
    for leaf in jax.tree.leaves(tree)
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  ]
  return jnp.all(
    leaves.reduce_each(lambda leaf: jnp.all(jnp.isfinite(leaf)), floats)
  )


def apply_eval(
  model: nn.Module, state: TrainState, images: jax.Array
) -> jax.Array:
  """float32[B, classes] logits of uint8[B, H, W, C] images, inference mode."""
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  logits = model.apply(variables, state.normalization(images), train=False)
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

  Args:
    experiment: the fixed parts.
    state: what is scored.
    images: uint8[B, H, W, C]; or several crops of each image, uint8[B, crops,
      H, W, C], whose probabilities are averaged.
    labels: int32[B].
    mask: bool[B], False for padding.

  Returns:
    Sums over the images that `mask` lets count, and the float32[B, classes]
    probabilities.
  """
  crops = images.reshape(-1, *images.shape[-3:])
  logits = apply_eval(experiment.model, state, crops)
  if images.ndim == 5:
    log_probabilities = jax.nn.log_softmax(
      logits.reshape(*images.shape[:2], logits.shape[-1])
    )
    # Their mean's logarithm, which is as good as logits.
    logits = jax.nn.logsumexp(log_probabilities, axis=1) - math.log(
      images.shape[1]
    )
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  loss = jnp.sum(jnp.where(mask, losses, 0.0))
  count = jnp.sum(mask, dtype=jnp.int32)
  sums = MetricSums(
    loss=loss,
    objective=loss + count * experiment.optimizer.penalty(state.params),
    correct=jnp.sum((jnp.argmax(logits, -1) == labels) & mask, dtype=jnp.int32),
    count=count,
  )
  return sums, jax.nn.softmax(logits)
