"""Calls of compiled programs, each of one training step or of several."""

import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_flax import data as datasets, step as train_step
from resnet_flax.parallel import (
  epochs,
  hosts as distributed,
  mesh as mesh_lib,
  networks as seeds_lib,
  resident,
)
from resnet_flax.run import errors

_logger = logging.getLogger(__name__)

# Of the arguments of several steps, the split and how many steps.
_NUM_SHARED = 3

# Of one seed, or of several.
State = train_step.TrainState | seeds_lib.Networks
# Of a state and a call's arguments, returning the new state and `StepMetrics`.
CompiledStep = Callable[..., tuple[Any, Any]]


class Call(NamedTuple):
  """What a call of a compiled step is given besides the state.

  Attributes:
    num_steps: how many steps it does.
    arguments: all others; arrays.
    first_batch: makes images and labels of its first step, for all seeds.
  """

  num_steps: int
  arguments: tuple[Any, ...]
  first_batch: Callable[[], tuple[Any, Any]]


# Called before a call with the number of steps done, the state and the call.
BeforeCall = Callable[[int, State, Call], None]


def compile_train_step(
  experiment: train_step.Experiment,
  state: State,
  batch_size: int,
  key: Any,
  layout: seeds_lib.Layout,
) -> CompiledStep:
  """Compiles one training step for the shapes and devices given.

  The state is donated: the caller's copy is gone after a call.

  Args:
    experiment: the fixed parts.
    state: of all seeds; only its shapes are used.
    batch_size: images of a step of one seed, over all devices.
    key: from `train.augmentation_key`; only its shapes are used.
    layout: where the networks are.

  Returns:
    A function of (state, uint8[B, H, W, C], int32[B], key), each for all seeds.
  """
  return compile_step(
    train_step.train_step,
    experiment,
    state,
    batch_size,
    key,
    layout,
    title="training step",
    donate_state=True,
  )


def compile_step(
  step: Callable[..., Any],
  experiment: train_step.Experiment,
  state: State,
  batch_size: int,
  key: Any,
  layout: seeds_lib.Layout,
  *,
  title: str,
  donate_state: bool,
) -> Callable[..., Any]:
  """Compiles a function like a training step; see `compile_train_step`.

  Args:
    step: of (experiment, state, images, labels, key) of one seed, returning a
      tree of arrays or a tuple of trees.
    experiment: the fixed parts.
    state: of all seeds; only its shapes are used.
    batch_size: images of a step of one seed, over all devices.
    key: from `train.augmentation_key`; only its shapes are used.
    layout: where the networks are.
    title: what to call it.
    donate_state: whether the state's memory is for the result.

  Returns:
    A function of (state, uint8[B, H, W, C], int32[B], key), each for all seeds.
  """
  trace = functools.partial(
    trace_step,
    *(step, experiment, state, batch_size, key, layout),
    donate_state=donate_state,
  )
  return layout.in_turn(_compile(title, trace, layout))


def trace_step(
  step: Callable[..., Any],
  experiment: train_step.Experiment,
  state: State,
  batch_size: int,
  key: Any,
  layout: seeds_lib.Layout,
  *,
  donate_state: bool,
) -> jax.stages.Traced:
  """One call of a function like a training step, before it is lowered.

  Needs no device: `seeds.Layout.shapes` stands for a state and a key.

  Args:
    step: see `compile_step`, as are the others.
    experiment: the fixed parts.
    state: of all seeds; only its shapes are used.
    batch_size: images of a step of one seed, over all devices.
    key: from `train.augmentation_key`; only its shapes are used.
    layout: where the networks are.
    donate_state: whether the state's memory is for the result.
  """
  images = layout.batch_shape((batch_size, *experiment.image_shape), np.uint8)
  labels = layout.batch_shape((batch_size,), np.int32)
  state, key = _of_a_call(state), _of_a_call(key)
  jitted = _jit_call(
    functools.partial(step, experiment), layout, donate_state=donate_state
  )
  return jitted.trace(state, images, labels, key)


def compile_train_steps(
  experiment: train_step.Experiment,
  state: State,
  placed: resident.Resident,
  batch_size: int,
  key: Any,
  layout: seeds_lib.Layout,
) -> CompiledStep:
  """Compiles a call of any number of training steps.

  The state is donated: the caller's copy is gone after a call.

  Args:
    experiment: the fixed parts.
    state: of all seeds; only its shapes are used.
    placed: the training split; only its shapes are used.
    batch_size: images of a step of one seed, over all devices.
    key: from `train.augmentation_key`; only its shapes are used.
    layout: where the networks are.

  Returns:
    A function of the arguments of `train_step.train_steps` after the first;
    state, order and key for all seeds.
  """
  trace = functools.partial(
    trace_train_steps, experiment, state, placed, batch_size, key, layout
  )
  compiled = _compile("training steps", trace, layout)
  return layout.in_turn(compiled, _NUM_SHARED)


def trace_train_steps(
  experiment: train_step.Experiment,
  state: State,
  placed: resident.Resident,
  batch_size: int,
  key: Any,
  layout: seeds_lib.Layout,
) -> jax.stages.Traced:
  """One call of any number of training steps, before it is lowered.

  Args:
    experiment: the fixed parts.
    state: of all seeds; only its shapes are used.
    placed: the training split; only its shapes are used.
    batch_size: images of a step of one seed, over all devices.
    key: from `train.augmentation_key`; only its shapes are used.
    layout: where the networks are.
  """
  steps = experiment.learning_rate.steps_per_epoch
  order = layout.batch_shape((batch_size, steps), np.int32)
  function = functools.partial(train_step.train_steps, experiment)
  shared = placed.images, placed.labels, np.int32(0)
  assert len(shared) == _NUM_SHARED
  jitted = _jit_call(function, layout, donate_state=True, shared=_NUM_SHARED)
  return jitted.trace(_of_a_call(state), order, _of_a_call(key), *shared)


def _jit_call(
  function: Callable[..., Any],
  layout: seeds_lib.Layout,
  *,
  donate_state: bool,
  shared: int = 0,
) -> jax.stages.Wrapped:
  """A function of one seed's state, jitted as one of a call's networks."""
  return jax.jit(
    layout.over_networks(function, shared),
    donate_argnums=0 if donate_state else (),
    out_shardings=layout.call_sharding(),
  )


def _of_a_call(networks: Any) -> Any:
  """What one call is given; all calls of a step are alike."""
  if isinstance(networks, seeds_lib.Networks):
    return networks.calls[0]
  return networks


def _compile(
  title: str,
  trace: Callable[[], jax.stages.Traced],
  layout: seeds_lib.Layout,
) -> jax.stages.Compiled:
  """Compiles what is traced, and says so."""
  started = time.perf_counter()
  _logger.info("compiling the %s", title)
  options = mesh_lib.compiler_options(layout.mesh)
  compiled = trace().lower().compile(options)
  distributed.meet()
  _logger.info("compiled in %.1f s", time.perf_counter() - started)
  return compiled


def compile_calls(
  config: ConfigDict,
  experiment: train_step.Experiment,
  state: State,
  split: datasets.Split,
  key: Any,
  layout: seeds_lib.Layout,
  steps_per_call: int,
) -> tuple[CompiledStep, Callable[[int, int], Iterator[Call]]]:
  """Compiles what training calls.

  Args:
    config: the experiment's.
    experiment: the fixed parts.
    state: of all seeds; only its shapes are used.
    split: what is trained on; put on the devices for several steps in a call.
    key: from `train.augmentation_key`.
    layout: where the networks are.
    steps_per_call: from `resident.steps_per_call`.

  Returns:
    The compiled step, and a function of an epoch and of the step of it to begin
    with, both 0-based, which gives the calls up to the epoch's end.
  """
  size = config.batch_size
  if steps_per_call == 1:
    compiled_step = compile_train_step(experiment, state, size, key, layout)

    def one_by_one(epoch: int, first: int) -> Iterator[Call]:
      batches = epochs.batches(split, size, epoch, layout, first=first)
      return one_step_calls(batches, key)

    return compiled_step, one_by_one

  placed = resident.place(split, layout)
  compiled_step = compile_train_steps(
    experiment, state, placed, size, key, layout
  )
  steps_per_epoch = experiment.learning_rate.steps_per_epoch

  def many_at_once(epoch: int, first: int) -> Iterator[Call]:
    start = epoch * steps_per_epoch
    ends = resident.call_ends(
      start + first,
      start + steps_per_epoch,
      steps_per_call,
      # What is done between two steps.
      (config.checkpoint.every_steps, config.log_layer_norms_every),
    )
    return many_step_calls(
      split, placed, size, epoch, key, layout, ends, first=first
    )

  return compiled_step, many_at_once


def one_step_calls(
  batches: Iterable[tuple[Any, Any]], key: Any
) -> Iterator[Call]:
  """A call for each batch, of what `compile_train_step` compiles.

  Args:
    batches: from `epochs.batches`.
    key: from `train.augmentation_key`.
  """
  for batch in batches:
    yield Call(1, (*batch, key), functools.partial(tuple, batch))


def many_step_calls(
  split: datasets.Split,
  placed: resident.Resident,
  batch_size: int,
  epoch: int,
  key: Any,
  layout: seeds_lib.Layout,
  ends: Iterable[int],
  *,
  first: int = 0,
) -> Iterator[Call]:
  """Calls of one epoch, of what `compile_train_steps` compiles.

  Args:
    split: what is trained on.
    placed: the same on the devices.
    batch_size: images of a batch of one seed, over all devices.
    epoch: 0-based.
    key: from `train.augmentation_key`.
    layout: where the networks are.
    ends: the number of steps done after each call, since the run began.
    first: the step of the epoch to begin with, 0-based.
  """
  rows = layout.rows(batch_size)
  # Put on the devices like a batch, whose axis comes first.
  ((order,),) = layout.batches(
    lambda seed: [
      (
        np.ascontiguousarray(
          epochs.order(len(split), batch_size, seed, epoch).T[rows], np.int32
        ),
      )
    ],
    batch_size,
  )
  start = epoch * (len(split) // batch_size)
  done = start + first
  for end in ends:

    def first_batch(within=done - start):
      batches = epochs.batches(split, batch_size, epoch, layout, first=within)
      return next(batches)

    num_steps = end - done
    shared = placed.images, placed.labels, np.int32(num_steps)
    yield Call(num_steps, (order, key, *shared), first_batch)
    done = end


def train_steps(
  compiled_step: CompiledStep,
  state: State,
  calls: Iterable[Call],
  on_call: Callable[[list[train_step.StepMetrics]], Any],
  until: Callable[[int], bool] = lambda step: False,
  *,
  layout: seeds_lib.Layout,
  before_call: BeforeCall = lambda step, state, call: None,
) -> tuple[State, list[train_step.StepMetrics]]:
  """Takes the steps of each call.

  Args:
    compiled_step: from `compile_train_step` or `compile_train_steps`.
    state: before the first step; donated.
    calls: at least one.
    on_call: called with what every call reports, of each seed, on the host.
    until: called with the number of steps done so far; true ends the loop.
    layout: where the networks are.
    before_call: called with what the next call is given.

  Returns:
    The new state and what the last call reports, of each seed, on the host.

  Raises:
    NonFiniteError: a step's objective or the state after it is not finite.
  """
  pending = None
  step = int(state.step)
  for call in calls:
    before_call(step, state, call)
    state, step_metrics = compiled_step(state, *call.arguments)
    step += call.num_steps
    # Read one call late: the devices have the next one to work on meanwhile.
    if pending is not None:
      on_call(_read(pending, layout))
    pending = step_metrics
    if until(step):
      break
  assert pending is not None  # `run.rules` leaves no empty epoch.
  last = _read(pending, layout)
  on_call(last)
  return state, last


def _read(
  step_metrics: Any, layout: seeds_lib.Layout
) -> list[train_step.StepMetrics]:
  of_seeds = layout.get(step_metrics)
  for seed, each in zip(layout.seeds, of_seeds, strict=True):
    if not each.finite:
      step = int(each.step)
      raise errors.NonFiniteError(
        f"the loss or the state{layout.of_seed(seed)} is not finite after"
        f" step {step} (0-based), at learning rate {each.learning_rate:g}."
        " Lower optimizer.learning_rate, or warm up with"
        " schedule.warmup_learning_rate.",
        step,
        seed,
      )
  return of_seeds
