"""One process of several, as if each were on a host of its own.

python -m tests.distributed_worker train COUNT SIGNAL FLAGS...
  Runs the command line and sends itself a signal at the given step event.
python -m tests.distributed_worker SCENARIO [SECONDS]
  Runs one of the functions below; what it says are lines of JSON in $SAID.
"""

import functools
import json
import os
import signal
import sys
import time

import jax
import numpy as np

from resnet_flax import main, train
from resnet_flax.parallel import hosts
from resnet_flax.run import errors, signals as signals_lib
from tests import helpers


def say(*values):
  with open(os.environ["SAID"], "a") as file:
    print(json.dumps(values), file=file)


def exchange(seconds):
  """All that processes tell one another, where process 0 takes its time."""

  def slow(value):
    time.sleep(seconds)
    return value

  index = jax.process_index()
  say(hosts.on_first(lambda: slow({"a": [1, 2.5, None]})))
  tree = {
    "negative zero": np.float32([[-0.0, np.nan], [1e-45, 3]]),
    "scalar": np.int32(7),
    "empty": np.zeros((0, 2), np.float32),
    "odd": np.array([True, False, True]),
  }
  found = hosts.from_first(
    lambda: slow(tree), lambda: jax.eval_shape(lambda: tree)
  )
  say([found[key].shape == tree[key].shape for key in tree])
  say([found[key].tobytes() == tree[key].tobytes() for key in tree])
  say(
    hosts.on_first_then_others(lambda: index),
    hosts.on_first_only(lambda: "own"),
  )
  hosts.check_same("it", {"a": 1})
  for name, value in [
    ("the configuration", {"a": index}),
    ("it", {"value": f"{index}"}),
  ]:
    try:
      hosts.check_same(name, value)
    except errors.ConfigError as error:
      say(str(error))
  for error in (
    errors.NonFiniteError("not finite"),
    errors.ConfigError("wrong"),
    errors.DataError("missing"),
  ):
    try:
      hosts.on_first(functools.partial(fail, error))
    except errors.UserError as caught:
      say(type(caught).__name__, str(caught), caught.exit_code)


def fail(error):
  raise error


def stop(seconds):
  """A signal to process 1 stops both at a step; process 0 saves for long."""
  with signals_lib.StopSignals() as signals, signals.hold():
    agreement = hosts.Agreement(signals, lambda: False, jax.devices())
    for step in range(1, 10):
      if step == 5 and not hosts.is_first():
        os.kill(os.getpid(), signal.SIGTERM)
      if agreement.wants_save():
        say("saves after", step)
        try:
          agreement.check()
        except signals_lib.Stopped:
          time.sleep(seconds if hosts.is_first() else 0)
          say("stops")
          raise errors.Interrupted("stopped", signal.SIGTERM) from None


def quit(seconds):
  """Process 1 has a mistake of its own, while process 0 waits for it."""
  del seconds
  if not hosts.is_first():
    raise errors.ConfigError("wrong here")
  hosts.meet()


def lose(seconds):
  """A computation fails, as when another process has died."""
  del seconds
  raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection reset")


def exhaust(seconds):
  """A computation fails by itself."""
  del seconds
  raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")


if __name__ == "__main__":
  scenario = sys.argv.pop(1)
  if scenario == "train":
    count, name = int(sys.argv.pop(1)), sys.argv.pop(1)
    send = functools.partial(os.kill, os.getpid(), signal.Signals[name])
    train.train_and_evaluate = functools.partial(
      train.train_and_evaluate,
      on_event=helpers.at_event("step", count, send),
    )
    main.run()
  try:
    with hosts.connected(hosts.find_cluster(), heartbeat_timeout=10):
      globals()[scenario](float(sys.argv[1]))
  except errors.UserError as error:
    errors.exit_with(str(error), error.exit_code)
