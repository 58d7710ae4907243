"""Optax's optimizers by name, with the arguments that each of them takes."""

import ast
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from ml_collections import ConfigDict

PREFIX = "optax/"
_MUON_COEFFICIENTS = np.array((3.4445, -4.775, 2.0315), np.float32)
_MASKS = {"mask", "weight_decay_mask"}  # Arguments that mask weight decay.
# These divide by the sum of the rates so far: NaN if the first one is 0.
NO_ZERO_RATE = (f"{PREFIX}dadapt_adamw", f"{PREFIX}prodigy")
OPTIMIZERS = ("adamw", "lamb", "lion", "muon")  # These need no prefix.
# Functions to leave out: they score other weights than they train, keep random
# keys, need gradients of single images, use the rate only for their first step,
# or are not optimizers.
_UNFIT = ("schedule_free", "noisy_sgd", "dpsgd", "rprop", "scale_by_", "_")


class Rule(NamedTuple):
  """An update rule: an optimizer as a function of the learning rate."""

  title: str  # NAME(VALUES), shown to the user.
  # Maps a learning rate, float32[], to Optax's optimizer.
  at_rate: Callable[..., optax.GradientTransformation]
  decays_weights: bool  # Whether it applies `optimizer.weight_decay` itself.


def rule(name: str, function: Callable[..., Any], **arguments: Any) -> Rule:
  """The rule of the optimizer `function(learning_rate, **arguments)`."""
  shown = [f"{k}={v}" for k, v in arguments.items() if not callable(v)]
  at_rate = functools.partial(function, **arguments)
  decays_weights = not _MASKS.isdisjoint(arguments)
  return Rule(f"{name}({', '.join(shown)})", at_rate, decays_weights)


def follow_rate(
  made: Rule, initial: float
) -> optax.GradientTransformationExtraArgs:
  """The optimizer; its `update` takes the step's rate as `learning_rate=`."""

  def update(updates, state, params=None, *, learning_rate, **_):
    return made.at_rate(learning_rate).update(updates, state, params)

  init = made.at_rate(initial).init
  return optax.GradientTransformationExtraArgs(init, update)


@functools.wraps(optax.contrib.muon)
def _muon(learning_rate, weight_decay, weight_decay_mask, **arguments):
  """Muon, which sees a convolution kernel as [H * W * inputs, outputs]."""
  matrix = optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)
  # Muon's Adam trains the other weights; it would decay them without a mask.
  arguments |= {
    "adam_weight_decay": 0.0,
    "muon_weight_dimension_numbers": lambda params: jax.tree.map(
      lambda w: matrix if w.ndim == 4 else None, params
    ),
  }
  # The state holds the coefficients; JAX's default dtype must not change it.
  arguments.setdefault("ns_coeffs", _MUON_COEFFICIENTS)
  decay = -learning_rate * weight_decay
  return optax.chain(
    optax.contrib.muon(learning_rate, **arguments),
    optax.add_decayed_weights(decay, weight_decay_mask),
  )


@functools.cache
def functions() -> dict[str, Callable[..., optax.GradientTransformation]]:
  """Optax's optimizers by name, as functions of a learning rate."""
  return {
    name: function
    for name, function in (
      vars(optax.contrib) | vars(optax) | {"muon": _muon}
    ).items()
    if isinstance(function, types.FunctionType | functools.partial)
    and "learning_rate" in inspect.signature(function).parameters
    and not name.startswith(_UNFIT)
  }


def create(config: ConfigDict, mask: Callable[[Any], Any]) -> Rule:
  """The optimizer that `config.name` and `config.arguments` describe.

  `mask` tells which parameters decay. Raises `ValueError` if the optimizer
  refuses the arguments, or needs more than gradients and parameters.
  """
  name = config.name.removeprefix(PREFIX)
  function = functions()[name]
  parameters = inspect.signature(function).parameters
  decay_names = [each for each in parameters if each.endswith("weight_decay")]
  # Other keys set the rate and the decay; `_muon` sets the dimensions.
  allowed = parameters.keys() - _MASKS - {"learning_rate", "adam_learning_rate"}
  allowed -= {*decay_names, "muon_weight_dimension_numbers"}
  mask_names = parameters.keys() & _MASKS if decay_names else set()
  decays = dict.fromkeys(decay_names, 0.0)
  if mask_names:
    decays["weight_decay"] = config.weight_decay
  try:
    arguments = _parse(config.arguments)
    if refused := sorted(arguments.keys() - allowed):
      raise ValueError(f"{refused[0]} cannot be set here")
    masks = dict.fromkeys(mask_names, mask)
    made = rule(name, function, **arguments, **decays, **masks)
    # Some arguments fail only in a step. Tracing one computes nothing.
    params = {"conv": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)}}
    tx = follow_rate(made, 0.1)
    before = jax.eval_shape(tx.init, params)
    update = functools.partial(tx.update, learning_rate=0.1)
    _, after = jax.eval_shape(update, params, before, params)
    if _dtypes(before) != _dtypes(after):
      raise ValueError("a step would change the dtypes of the state")
  # Optax raises many kinds of exceptions.
  except Exception as error:
    raise ValueError(
      f"optimizer.arguments={config.arguments!r:.80} cannot be used:"
      f" {' '.join(str(error).split()):.120}. {name} takes:"
      f" {', '.join(each for each in parameters if each in allowed)}."
    ) from error
  return made


def _dtypes(state: Any) -> list[np.dtype]:
  return [each.dtype for each in jax.tree.leaves(state)]


def _parse(text: str) -> dict[str, Any]:
  """Parses arguments such as 'b1=0.9,nesterov=True'."""
  call = ast.parse(f"f({text})", mode="eval").body
  if not isinstance(call, ast.Call) or call.args:
    raise ValueError("it must be NAME=VALUE,..., as b1=0.9,nesterov=True")
  arguments = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
  if len(arguments) < len(call.keywords):
    raise ValueError("an argument is given twice")
  return arguments
