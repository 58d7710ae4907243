"""Optax's optimizers by their names, with arguments of their own."""

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
_COEFFICIENTS = np.array((3.4445, -4.775, 2.0315), np.float32)  # Muon's.
_MASKS = {"mask", "weight_decay_mask"}  # Of an optimizer's own weight decay.
OPTIMIZERS = ("adamw", "lamb", "lion", "muon")  # These need no prefix.
# They are scored with other weights than they train with, keep random keys or
# gradients of single images, use the rate for their first step alone, or are no
# optimizer.
_UNFIT = ("schedule_free", "noisy_sgd", "dpsgd", "rprop", "scale_by_", "_")


class Rule(NamedTuple):
  """What makes an update of a gradient."""

  title: str  # For people.
  # Optax's optimizer at a learning rate, float32[].
  at_rate: Callable[..., optax.GradientTransformation]
  decays_weights: bool  # Whether it sees to `optimizer.weight_decay` itself.


def rule(name: str, **arguments: Any) -> Rule:
  """Optax's optimizer of this name with these arguments."""
  shown = [f"{k}={v}" for k, v in arguments.items() if not callable(v)]
  at_rate = functools.partial(functions()[name], **arguments)
  decays_weights = not _MASKS.isdisjoint(arguments)
  return Rule(f"{name}({', '.join(shown)})", at_rate, decays_weights)


def follow_rate(
  made: Rule, initial: float
) -> optax.GradientTransformationExtraArgs:
  """The optimizer at the rate that `update` is given, which is logged too."""

  def update(updates, state, params=None, *, learning_rate, **_):
    return made.at_rate(learning_rate).update(updates, state, params)

  init = made.at_rate(initial).init
  return optax.GradientTransformationExtraArgs(init, update)


@functools.wraps(optax.contrib.muon)
def _muon(learning_rate, weight_decay, weight_decay_mask, **arguments):
  """Muon of convolution kernels, as [H * W * inputs, outputs]."""
  matrix = optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)
  # Its Adam, for the other weights, would decay them without a mask.
  arguments |= {
    "adam_weight_decay": 0.0,
    "muon_weight_dimension_numbers": lambda params: jax.tree.map(
      lambda w: matrix if w.ndim == 4 else None, params
    ),
  }
  # The state has them, which has one form whatever JAX's default is.
  arguments.setdefault("ns_coeffs", _COEFFICIENTS)
  decay = -learning_rate * weight_decay
  return optax.chain(
    optax.contrib.muon(learning_rate, **arguments),
    optax.add_decayed_weights(decay, weight_decay_mask),
  )


@functools.cache
def functions() -> dict[str, Callable[..., optax.GradientTransformation]]:
  """Optax's optimizers, functions of a learning rate, by their names."""
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

  `mask` says of parameters which of them decay. A `ValueError` if the optimizer
  does not take these arguments, or needs more than gradients and parameters.
  """
  name = config.name.removeprefix(PREFIX)
  parameters = inspect.signature(functions()[name]).parameters
  decays = [each for each in parameters if each.endswith("weight_decay")]
  # The rate and the decay have keys of their own; `_muon` gives dimensions.
  takes = parameters.keys() - _MASKS - {"learning_rate", "adam_learning_rate"}
  takes -= {*decays, "muon_weight_dimension_numbers"}
  masks = parameters.keys() & _MASKS if decays else set()
  given = dict.fromkeys(decays, 0.0)
  if masks:
    given["weight_decay"] = config.weight_decay
  try:
    arguments = _parse(config.arguments)
    if wrong := sorted(arguments.keys() - takes):
      raise ValueError(f"{wrong[0]} is none of them")
    made = rule(name, **arguments, **given, **dict.fromkeys(masks, mask))
    # Traces a step.
    params = {"conv": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)}}
    tx = follow_rate(made, 0.1)
    jax.eval_shape(
      lambda w: tx.update(w, tx.init(w), w, learning_rate=0.1), params
    )
  # Optax raises many kinds, according to what is wrong.
  except Exception as error:
    raise ValueError(
      f"optimizer.arguments={config.arguments!r:.80} cannot be used:"
      f" {' '.join(str(error).split()):.120}. {name} takes:"
      f" {', '.join(each for each in parameters if each in takes)}."
    ) from error
  return made


def _parse(text: str) -> dict[str, Any]:
  """The arguments of 'b1=0.9,nesterov=True'."""
  call = ast.parse(f"f({text})", mode="eval").body
  if not isinstance(call, ast.Call) or call.args:
    raise ValueError("it must be like b1=0.9,nesterov=True")
  arguments = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
  if len(arguments) < len(call.keywords):
    raise ValueError("an argument stands twice")
  return arguments
