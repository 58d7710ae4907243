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
# The entries of `metric_sums` and, with `log.norms`, `NORMS`: float32[] each.
# They are sums over images, so that batches of different sizes can be added.
MetricSums = dict[str, jax.Array]
# Norms over all arrays: of the cross-entropy's gradient and of the weights.
NORMS = ("gradient_norm", "weight_norm")


class TrainState(flax.struct.PyTreeNode):
  """Everything that training carries from one step to the next."""

  step: jax.Array  # int32[], steps done.
  params: PyTree  # float32
  batch_stats: PyTree  # Running means and variances, float32.
  opt_state: PyTree  # The Optax chain's state.
  rate_state: rate_rules.RateState
  # Sums of the epoch so far. A checkpoint may have more or fewer metrics.
  epoch_sums: MetricSums
  normalization: normalize.Normalization
  average: PyTree = None  # Averaged `variables`, with ema or swa.

  @property
  def variables(self) -> dict[str, PyTree]:
    """The variables that `model.apply` takes."""
    return {"params": self.params, "batch_stats": self.batch_stats}


class StepMetrics(flax.struct.PyTreeNode):
  """What one training step reports."""

  step: jax.Array  # int32[], 0-based.
  sums: MetricSums  # Sums of the epoch so far, this step included.
  learning_rate: jax.Array  # float32[], used by this step.
  finite: jax.Array  # bool[]: objective and new state are finite.


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The fixed parts of an experiment, which the steps close over."""

  model: nn.Module  # Called as model.apply(variables, images, train=...).
  optimizer: optimizers.Optimizer
  learning_rate: learning_rates.LearningRate
  augment: augment.Augment  # (key, images, targets) -> (images, targets).
  image_shape: tuple[int, int, int]  # (H, W, C)
  num_classes: int  # Outputs of the network's head.
  # Share of each label that training spreads over all classes (Szegedy et
  # al. 2015, section 7).
  label_smoothing: float = 0.0
  # Maps (key, uint8[B, H, W, C], epoch) to images, before normalisation.
  augment_bytes: Callable[..., jax.Array] = lambda key, images, epoch: images
  log_norms: bool = False  # Whether training also sums `NORMS`.
  # Maps a state to its new average; the first is a copy (`averaging.create`).
  average: Callable[[TrainState], PyTree] = lambda state: None


# ---- The train state


def create_train_state(
  experiment: Experiment,
  key: jax.Array,
  normalization: normalize.Normalization,
) -> TrainState:
  """The state before the first step, with parameters drawn from `key`, key[].

  Do not call this under `jax.jit`: a deep network would compile for minutes.
  """
  images = jax.ShapeDtypeStruct((1, *experiment.image_shape), jnp.float32)
  # Draws the parameters without running the network.
  variables = experiment.model.lazy_init(key, images, train=False)
  return state_from(experiment, variables, normalization)


def state_from(
  experiment: Experiment,
  variables: Mapping[str, PyTree],
  normalization: normalize.Normalization,
) -> TrainState:
  """The state before the first step, with the given variables."""
  logits = jax.ShapeDtypeStruct((1, experiment.num_classes), jnp.float32)
  label = jax.ShapeDtypeStruct((1,), jnp.int32)
  mask = jax.ShapeDtypeStruct((1,), jnp.bool_)
  sums = jax.eval_shape(metric_sums, 0.0, 0.0, logits, label, mask)
  names = (*sums, *(NORMS if experiment.log_norms else ()))
  state = TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables["params"],
    # A network without batch norm has no running statistics.
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
  """Whether each label is among the first 5 by scores, [B, classes]: bool[B].

  Of equal scores, the lower class comes first.
  """
  # `true`: the labels' scores. A sort would make devices gather all scores.
  classes, labels = np.arange(scores.shape[-1])[None], labels[:, None]
  true = scores.max(-1, where=classes == labels, initial=-np.inf, keepdims=True)
  after = (scores < true) | ((scores == true) & (classes >= labels))
  return (~after).sum(axis=-1) < 5  # NaN counts as before.


def metric_sums(
  loss: jax.Array,
  objective: jax.Array,
  logits: jax.Array,
  labels: jax.Array,
  mask: jax.Array,
) -> MetricSums:
  """The metrics of a batch, in training and in evaluation.

  Each entry is a sum over the images where `mask`, bool[B], is True. The mean
  is recorded and drawn under the entry's name, for every split. `loss` sums the
  cross-entropies; `objective` adds the L2 term for each image. `labels` are the
  data set's, not the targets that an augmentation made of them.
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
  """The key[] for 'augmentation' and for 'dropout' at a 0-based step."""
  # No step has this number, so no dropout key is an augmentation key.
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

  `train_loss` records it; evaluation uses `cross_entropy` alone. Also returns
  the float32[B, classes] logits and the collections that modules wrote:
  'batch_stats' and the names in `collections`, if modules have them.
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

  `images` are uint8[B, H, W, C], `labels` int32[B]. `key`, key[], is the same
  at every step: the step's number is folded in here.
  """
  return train_step_and_gradient(experiment, state, images, labels, key)[:2]


def train_step_and_gradient(
  experiment: Experiment,
  state: TrainState,
  images: jax.Array,
  labels: jax.Array,
  key: jax.Array,
  collections: Sequence[str] = (),
) -> tuple[TrainState, StepMetrics, PyTree, Mapping[str, PyTree]]:
  """Like `train_step`; also returns the gradient and written collections."""
  keys = step_keys(key, state.step)
  epoch = state.step // experiment.learning_rate.steps_per_epoch
  # Both use this key: `augment_bytes` folds numbers in, `augment` splits it.
  images = experiment.augment_bytes(keys["augmentation"], images, epoch)
  # The recipe normalises before it shifts, so edges get normalised pixels.
  images, targets = experiment.augment(
    keys["augmentation"], state.normalization(images), labels
  )

  # Forward and backward, without L2: the optimizer's chain adds its gradient.
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

  # Metrics: the first step of an epoch starts new sums.
  objective = loss + experiment.optimizer.penalty(state.params)
  count = labels.shape[0]
  sums = metric_sums(
    loss * count, objective * count, logits, labels, jnp.ones(count, bool)
  )
  if experiment.log_norms:
    trees = zip(NORMS, (grads, state.params), strict=True)
    sums |= {name: count * grouping.norm(tree) for name, tree in trees}
  after_step = experiment.learning_rate.rules.after_step
  is_first = state.step % experiment.learning_rate.steps_per_epoch == 0
  epoch_sums = jax.tree.map(
    lambda old, new: jnp.where(is_first, new, old + new), state.epoch_sums, sums
  )
  new_state = state.replace(
    step=state.step + 1,
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    rate_state=after_step(state.rate_state, 1 - sums["accuracy"] / count),
    epoch_sums=epoch_sums,
  )
  new_state = new_state.replace(average=experiment.average(new_state))
  floats = [
    leaf
    for leaf in jax.tree.leaves((objective, params, batch_stats, opt_state))
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  ]
  finite = grouping.reduce_each(lambda x: jnp.all(jnp.isfinite(x)), floats)
  metrics = StepMetrics(state.step, epoch_sums, rate, jnp.all(finite))
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

  `images` are uint8[B, H, W, C] or, with several crops of each image, uint8[B,
  crops, H, W, C]; the probabilities are averaged over crops. `labels` are
  int32[B]. `mask`, bool[B], is False for padding. Returns `metric_sums` and the
  float32[B, classes] probabilities.
  """
  crops = images.reshape(-1, *images.shape[-3:])
  logits = apply_eval(experiment.model, state, crops)
  if images.ndim == 5:
    log_probabilities = jax.nn.log_softmax(
      logits.reshape(*images.shape[:2], logits.shape[-1])
    )
    # Logits whose softmax is the mean of the crops' probabilities.
    logits = jax.nn.logsumexp(log_probabilities, axis=1) - math.log(
      images.shape[1]
    )
  loss = jnp.sum(jnp.where(mask, cross_entropy(logits, labels), 0.0))
  penalty = experiment.optimizer.penalty(state.params)
  objective = loss + jnp.sum(mask, dtype=jnp.float32) * penalty
  sums = metric_sums(loss, objective, logits, labels, mask)
  return sums, jax.nn.softmax(logits)
