"""Measures the cost of depth, plain, rematerialised and looped.

  python -m experiments.depth_cost --out=FILE.json [--name=resnet_v1]
    [--depths=20,56,110] [--modes=plain,remat,scan,scan+remat]
    [--batch_size=32] [--steps=3]

Each depth and mode is measured in its own process, on one resident batch,
without a compilation cache. Nothing else should run meanwhile.
"""

import functools
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging as absl_logging

from configs import base
from experiments.depth_cost import table
from experiments.tools import markdown
from resnet_flax import step as step_lib
from resnet_flax.data import normalize as normalization, randomness
from resnet_flax.parallel import mesh as mesh_lib
from resnet_flax.run import (
  environment,
  experiment as experiment_lib,
  files as files_lib,
  huge_pages,
  rules,
)

MODES = {
  "plain": {},
  "remat": {"remat": True},
  "scan": {"scan": True},
  "scan+remat": {"scan": True, "remat": True},
}

_NAME = flags.DEFINE_string("name", "resnet_v1", "The network's `model.name`.")
_DEPTHS = flags.DEFINE_list("depths", ["20", "56", "110"], "Network depths.")
_MODES = flags.DEFINE_list("modes", list(MODES), f"Any of {', '.join(MODES)}.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images per step.")
_STEPS = flags.DEFINE_integer("steps", 3, "Number of timed steps.")
_OUT = flags.DEFINE_string("out", "", "JSON file, written after each process.")
_CHILD = flags.DEFINE_bool("child", False, "Measure here; print JSON.")
flags.register_validator(
  "modes",
  lambda modes: set(modes) <= set(MODES),
  f"must be any of {', '.join(MODES)}.",
)


def measure(
  name: str, depth: int, mode: str, batch_size: int, steps: int
) -> dict[str, Any]:
  """Measures one depth in one mode, on the first device of this process.

  Args:
    name: `model.name` of the network, in the Keras recipe.
    depth: `model.depth` of the network.
    mode: a key of `MODES`.
    batch_size: images per step.
    steps: number of timed steps, after one warm-up step.

  Returns:
    The arguments, `trace_init_seconds` and `trace_step_seconds` (the first
    trace, with shapes only), `initialize_seconds` (the real state),
    `lower_seconds`, `compile_seconds`, `compile_cpu_seconds` (of all threads),
    `temporary_mb` (XLA's plan), `peak_mb` (the process's resident memory),
    `step_seconds` (one per step), `losses` (the epoch's mean after each step
    and the warm-up step), `changed` (the share of kernels that changed).

  Raises:
    FloatingPointError: a step's results are not finite.
  """
  # With a cache, the times would not include compilation.
  jax.config.update("jax_enable_compilation_cache", False)
  config = base.get_config()
  config.batch_size = batch_size
  config.model.update({"name": name, "depth": depth, **MODES[mode]})
  rules.check(config, num_devices=1)
  experiment = experiment_lib.build(config)
  key = randomness.device_key(config.seed, randomness.Purpose.AUGMENTATION)
  create = functools.partial(step_lib.create_train_state, experiment)
  initial = (
    randomness.device_key(config.seed, randomness.Purpose.INITIALIZATION),
    normalization.placeholder(config.normalization, experiment.image_shape),
  )
  rng = np.random.default_rng(0)
  shape = (batch_size, *experiment.image_shape)
  batch = jax.device_put(
    (
      rng.integers(0, 256, shape, np.uint8),
      rng.integers(0, 10, batch_size, np.int32),
    )
  )
  step = functools.partial(step_lib.train_step, experiment)
  started = time.perf_counter()
  shapes = jax.eval_shape(create, *initial)
  trace_init_seconds = time.perf_counter() - started
  started = time.perf_counter()
  traced = jax.jit(step, donate_argnums=0).trace(shapes, *batch, key)
  trace_step_seconds = time.perf_counter() - started
  started = time.perf_counter()
  state = jax.device_put(create(*initial), jax.devices()[0])
  initialize_seconds = time.perf_counter() - started
  started = time.perf_counter()
  lowered = traced.lower()
  lower_seconds = time.perf_counter() - started
  started, cpu_started = time.perf_counter(), time.process_time()
  compiled = lowered.compile(mesh_lib.compiler_options(mesh_lib.create_mesh()))
  compile_seconds = time.perf_counter() - started
  compile_cpu_seconds = time.process_time() - cpu_started
  del traced, lowered  # Training does not keep them either.
  before = _kernels(state)
  step_seconds, losses = [], []
  for _ in range(steps + 1):
    started = time.perf_counter()
    state, step_metrics = compiled(state, *batch, key)
    jax.block_until_ready((state, step_metrics))
    step_seconds.append(time.perf_counter() - started)
    sums = step_metrics.sums
    losses.append(float(sums["loss"] / sums["count"]))
    if not step_metrics.finite:
      raise FloatingPointError(f"Step {len(losses)} is not finite: {losses}")
  changed = [
    not np.array_equal(old, new)
    for old, new in zip(before, _kernels(state), strict=True)
  ]
  memory = compiled.memory_analysis()
  assert memory is not None  # CPUs, GPUs and TPUs all have it.
  return {
    "name": name,
    "depth": depth,
    "mode": mode,
    "batch_size": batch_size,
    "trace_init_seconds": trace_init_seconds,
    "trace_step_seconds": trace_step_seconds,
    "initialize_seconds": initialize_seconds,
    "lower_seconds": lower_seconds,
    "compile_seconds": compile_seconds,
    "compile_cpu_seconds": compile_cpu_seconds,
    "temporary_mb": memory.temp_size_in_bytes / 1e6,
    "peak_mb": _peak_bytes() / 1e6,
    "step_seconds": step_seconds[1:],
    "losses": losses,
    "changed": statistics.mean(changed),
  }


def _kernels(state: step_lib.TrainState) -> list[np.ndarray]:
  """Copies all kernels to the host."""
  return [
    np.array(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    if path[-1].key == "kernel"
  ]


def _peak_bytes() -> int:
  """The peak resident memory of this process."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


def _measure_in_child(depth: int, mode: str) -> dict[str, Any]:
  command = [
    *(sys.executable, "-m", "experiments.depth_cost", "--child"),
    *(f"--name={_NAME.value}", f"--depths={depth}", f"--modes={mode}"),
    *(f"--batch_size={_BATCH_SIZE.value}", f"--steps={_STEPS.value}"),
  ]
  child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(child.stdout)


def main(argv: list[str]) -> None:
  """Measures, prints each row of the table, and writes the raw figures."""
  del argv
  absl_logging.set_verbosity(absl_logging.FATAL)
  if _CHILD.value:
    (depth,), (mode,) = _DEPTHS.value, _MODES.value
    result = measure(
      _NAME.value, int(depth), mode, _BATCH_SIZE.value, _STEPS.value
    )
    # The parent cannot describe the devices: it leaves them to its children.
    result["environment"] = environment.describe(jax.devices())
    print(json.dumps(result))
    return
  print(markdown.table(table.COLUMNS, []), flush=True)
  environments, results = [], []
  for depth in _DEPTHS.value:
    for mode in _MODES.value:
      result = _measure_in_child(int(depth), mode)
      environments.append(result.pop("environment"))
      results.append(result)
      print(table.row(result), flush=True)
      if _OUT.value:
        files_lib.write_json(
          pathlib.Path(_OUT.value),
          {"environment": environments[0], "results": results},
        )


if __name__ == "__main__":
  huge_pages.use()
  app.run(main)
