"""Our convolution against `nn.Conv` on a batch shared out over CPU devices.

  python -m experiments.throughput.virtual_devices [--devices=8]
    [--batch_size=128] [--rounds=3] [--steps=4]

Devices that are threads of one CPU show what sharding costs, not what it gains.
Both have our batch norm.
"""

import dataclasses
import itertools
import statistics
import time
from unittest import mock

import flax.linen as nn
import jax
from absl import app, flags

from configs import v1_depth20
from experiments.tools.timing import in_turn, noise, prepare
from resnet_flax.parallel import mesh as mesh_lib
from resnet_flax.run import experiment as experiment_lib, huge_pages

_DEVICES = flags.DEFINE_integer("devices", 8, "Virtual CPU devices.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images, over all.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds, each of both.")
_STEPS = flags.DEFINE_integer("steps", 4, "Training steps of a round.")


def plain_conv(
  num_filters: int,
  kernel_size: tuple[int, int],
  strides: int,
  *,
  name: str,
) -> nn.Module:
  """nn.Conv with JAX's own convolution; initial values do not matter here."""
  return nn.Conv(num_filters, kernel_size, strides, name=name)


def measure(batch_size: int, rounds: int, steps: int) -> dict[str, list[float]]:
  """Images/s of ResNet-20's training step on all devices, in turn.

  Args:
    batch_size: images of a step, divisible by the devices.
    rounds: how often each is measured, after one that warms up.
    steps: of one measurement.

  Returns:
    Images/s of each round: `ours` and `plain`.
  """
  config = v1_depth20.get_config()
  config.batch_size = batch_size
  ours = experiment_lib.build(config)
  experiments = {
    "ours": ours,
    "plain": dataclasses.replace(ours, model=ours.model.clone(conv=plain_conv)),
  }
  mesh = mesh_lib.create_mesh()
  batch = noise(batch_size, ours.image_shape)
  residents = {}
  for name, experiment in experiments.items():
    # The compiler's options suit our convolution; JAX's has the default ones.
    options = {} if name == "plain" else mesh_lib.compiler_options(mesh)
    with mock.patch.object(
      mesh_lib, "compiler_options", lambda _, o=options: o
    ):
      residents[name] = prepare(config, experiment, *batch)
  speeds: dict[str, list[float]] = {name: [] for name in experiments}
  for round_number, name in in_turn(experiments, rounds):
    resident = residents[name]
    started = time.perf_counter()
    resident.train(itertools.repeat(resident.batch, steps))
    if round_number:
      seconds = time.perf_counter() - started
      speeds[name].append(steps * batch_size / seconds)
  return speeds


def main(argv: list[str]) -> None:
  """Prints the speeds and their ratios, pair by pair."""
  del argv
  jax.config.update("jax_num_cpu_devices", _DEVICES.value)
  speeds = measure(_BATCH_SIZE.value, _ROUNDS.value, _STEPS.value)
  speeds["ours / plain"] = [
    a / b for a, b in zip(speeds["ours"], speeds["plain"], strict=True)
  ]
  for name, values in speeds.items():
    print(
      f"{name}: {statistics.median(values):.2f}"
      f" ({min(values):.2f}-{max(values):.2f}, n = {len(values)})"
    )


if __name__ == "__main__":
  huge_pages.use()
  app.run(main)
