"""The cost of one depth in one mode, and its row of the table."""

import contextlib
import functools
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging

from configs import base
from experiments.tools import markdown
from resnet_flax import step as step_lib
from resnet_flax.data import normalize as normalization, randomness
from resnet_flax.parallel import mesh as mesh_lib
from resnet_flax.run import environment, experiment as experiment_lib, rules

MODES = {
  "plain": {},
  "remat": {"remat": True},
  "scan": {"scan": True},
  "scan+remat": {"scan": True, "remat": True},
}
COLUMNS = (
  *("network", "batch", "mode", "trace and lower s", "compile s"),
  *("temporary MB", "peak MB", "s/step"),
)


def measure(
  name: str, depth: int, mode: str, batch_size: int, steps: int
) -> dict[str, Any]:
  """Measures one depth in one mode, on the first device of this new process.

  Gives the arguments, `trace_init_seconds` and `trace_step_seconds` (the first
  trace, with shapes only), `initialize_seconds` (the real state),
  `lower_seconds`, `compile_seconds`, `compile_cpu_seconds` (of all threads),
  `temporary_mb` (XLA's plan), `peak_mb` (the process's resident memory),
  `step_seconds` (one per step), `losses` (the mean so far, after the warm-up
  step and each step), `changed` (the share of kernels that changed).

  Raises `FloatingPointError` if a step's results are not finite.
  """
  absl_logging.set_verbosity(absl_logging.FATAL)
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
  images = rng.integers(0, 256, shape, np.uint8)
  labels = rng.integers(0, 10, batch_size, np.int32)
  # `timing` is not used, since its imports would count in `peak_mb`.
  batch = jax.device_put((images, labels))
  step = functools.partial(step_lib.train_step, experiment)
  result: dict[str, Any] = {"name": name, "depth": depth, "mode": mode}
  result["batch_size"] = batch_size
  timed = functools.partial(_timed, result)
  with timed("trace_init_seconds"):
    shapes = jax.eval_shape(create, *initial)
  with timed("trace_step_seconds"):
    traced = jax.jit(step, donate_argnums=0).trace(shapes, *batch, key)
  with timed("initialize_seconds"):
    state = jax.device_put(create(*initial), jax.devices()[0])
  with timed("lower_seconds"):
    lowered = traced.lower()
  options = mesh_lib.compiler_options(mesh_lib.create_mesh())
  cpu_started = time.process_time()
  with timed("compile_seconds"):
    compiled = lowered.compile(options)
  result["compile_cpu_seconds"] = time.process_time() - cpu_started
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
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return {
    **result,
    "temporary_mb": memory.temp_size_in_bytes / 1e6,
    # Bytes on macOS, KiB elsewhere.
    "peak_mb": peak * (1 if sys.platform == "darwin" else 1024) / 1e6,
    "step_seconds": step_seconds[1:],
    "losses": losses,
    "changed": statistics.mean(changed),
    "environment": environment.describe(jax.devices()),
  }


@contextlib.contextmanager
def _timed(result: dict[str, Any], name: str) -> Iterator[None]:
  started = time.perf_counter()
  yield
  result[name] = time.perf_counter() - started


def _kernels(state: step_lib.TrainState) -> list[np.ndarray]:
  """Copies all kernels to the host."""
  return [
    np.array(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    if path[-1].key == "kernel"
  ]


def row(result: dict[str, Any]) -> str:
  """Formats one result of `measure` as a row in Markdown."""
  steps = result["step_seconds"]
  lowering = result["trace_step_seconds"] + result["lower_seconds"]
  cells = [
    f"{result['name'].removeprefix('resnet_')} {result['depth']}",
    result["batch_size"],
    result["mode"],
    f"{lowering:.1f}",
    f"{result['compile_seconds']:.1f}",
    f"{result['temporary_mb']:.0f}",
    f"{result['peak_mb']:.0f}",
    markdown.spread(steps, ".2f") if steps[1:] else f"{steps[0]:.2f}",
  ]
  return markdown.row(cells)
