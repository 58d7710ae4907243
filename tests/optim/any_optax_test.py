import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from resnet_flax.optim import any_optax, optimizers
from resnet_flax.run import config as config_keys, errors, keys, rules


def check(name, arguments="", **values):
  """The configuration's optimizer, if the rules let it pass."""
  config = base.get_config()
  config.optimizer.update({"name": name, "arguments": arguments} | values)
  rules.check(config, num_devices=1)
  return optimizers.create_optimizer(config.optimizer)


@pytest.mark.parametrize(
  ("name", "arguments", "message"),
  [
    ("lion", "b3=1", "b3 cannot be set here. lion takes: b1, b2, mu_dtype"),
    (
      "lion",
      "b1",
      "it must be NAME=VALUE,..., as b1=0.9,nesterov=True. lion takes: b1, b2",
    ),
    ("lion", "0.9", "it must be NAME=VALUE"),
    ("lion", "b1=[}", "does not match .* lion takes: b1"),
    ("lion", "b1=0.9)+f(", "it must be NAME=VALUE"),
    ("lion", "b1='x'", "unsupported operand .* lion takes: b1"),
    ("lion", "b1=open('x')", "malformed .* lion takes"),
    ("lion", "**{}", "None cannot be set here"),
    ("lion", "b1=0.5,b1=0.7", "an argument is given twice. lion takes: b1"),
    ("lion", "weight_decay=0.1", "weight_decay cannot be set here"),
    (
      "muon",
      "muon_weight_dimension_numbers=None",
      r"dimension_numbers cannot be set here\. muon takes: ns_coeffs",
    ),
    ("muon", "learning_rate=1", "muon takes: ns_coeffs, ns_steps, beta"),
    ("optax/nadamm", "", "Did you mean 'nadam'. Known: acprop, .*, yogi"),
    ("optax/lbfgs", "", "missing .* 'value'"),
    ("optax/scale_by_learning_rate", "", "is not known"),
    ("optax/schedule_free_sgd", "", "is not known"),
    (
      "adam",
      "b1=0.8",
      "must be empty for adam, which has keys of its own .*=optax/adam takes",
    ),
    ("optax/rprop", "", "is not known"),
    ("muon", "adam_learning_rate=1.0", "muon takes:"),
    ("nadam", "", "Known: adam, adamw, lamb, lion, muon, optax/NAME, sgd"),
    (
      "optax/ademamix",
      "mu_dtype='bfloat16'",
      "would change the dtypes of the state. ademamix takes: b1",
    ),
    ("lion", "x" * 2000, "syntax, such as b1=0.9"),
    ("lion", "b1=\n0.9", "syntax, such as"),
  ],
)
def test_what_cannot_be_ends_in_a_line_that_says_what_can(
  name, arguments, message
):
  with pytest.raises(errors.ConfigError, match=message) as caught:
    check(name, arguments)
  assert str(caught.value).isprintable()
  assert len(str(caught.value)) < 500


def test_an_optimizer_of_ones_own(monkeypatch):
  """An entry of the table and of the key's choices; see docs/extending.md."""
  monkeypatch.setitem(
    *(optimizers.OPTIMIZERS, "mine"),
    lambda config: any_optax.Rule("mine()", optax.sgd, False),
  )
  key = config_keys.KEYS["optimizer.name"]
  values = keys.choice(*key.values.choices, "mine")
  monkeypatch.setitem(
    config_keys.KEYS, key.name, dataclasses.replace(key, values=values)
  )
  assert check("mine").links[-1] == "mine()"


@pytest.mark.parametrize("name", any_optax.NO_ZERO_RATE)
@pytest.mark.parametrize(
  "schedule", [{"linear_warmup_epochs": 1.0}, {"name": "onecycle"}]
)
def test_a_rate_of_zero_is_refused_where_it_gives_nan(name, schedule):
  config = base.get_config()
  config.optimizer.name = name
  rules.check(config, num_devices=1)
  config.schedule.update(schedule)
  with pytest.raises(errors.ConfigError, match="the first rate of onecycle"):
    rules.check(config, num_devices=1)
  if "prodigy" in name:
    config.optimizer.arguments = "beta3=0.8, safeguard_warmup = True"
    rules.check(config, num_devices=1)


def test_only_those_give_nan_at_a_rate_of_zero():
  params = {"kernel": jnp.arange(1.0, 5.0)}
  not_finite = set()
  for name in any_optax.functions():
    try:
      tx = check(f"optax/{name}").tx
    except errors.ConfigError:
      continue
    state = tx.init(params)
    for rate in (jnp.float32(0.0), jnp.float32(0.1)):
      updates, state = tx.update(params, state, params, learning_rate=rate)
    if not np.isfinite(updates["kernel"]).all():
      not_finite.add(f"optax/{name}")
  assert not_finite == {*any_optax.NO_ZERO_RATE}


def test_arguments_are_optaxs():
  ours = check("lion", "b1=0.5, b2=0.7")
  theirs = optax.lion(0.1, b1=0.5, b2=0.7, weight_decay=0.0)
  assert ours.links[-1] == "lion(b1=0.5, b2=0.7, weight_decay=0.0)"
  params = {"layer": {"kernel": jnp.arange(4.0)}}
  state, expected = ours.tx.init(params), theirs.init(params)
  for sign in (1.0, -2.0):
    grads = {"layer": {"kernel": sign * jnp.ones(4)}}
    found, state = ours.tx.update(grads, state, params, learning_rate=0.1)
    other, expected = theirs.update(grads, expected, params)
    np.testing.assert_array_equal(
      found["layer"]["kernel"], other["layer"]["kernel"]
    )


def test_most_of_optax_can_be_used():
  """The refused optimizers need the loss, or are deprecated."""
  refused = set()
  for name in any_optax.functions():
    try:
      check(f"optax/{name}")
    except errors.ConfigError:
      refused.add(name)
  assert refused <= {
    *("lbfgs", "momo", "momo_adam", "sophia", "optimistic_adam"),
  }
  assert len(any_optax.functions()) - len(refused) > 30
