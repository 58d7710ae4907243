"""Code of all workers; standard library only, as their environments differ."""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

NUM_CLASSES = 10
IMAGE_SHAPE = (32, 32, 3)
MATMUL_SIZE = 1024
_MATMUL_SECONDS = 1.0
_MIN_STEPS = 3
# Warm-up time as a fraction of the measured time.
_WARM_UP = 1 / 3


@dataclasses.dataclass(frozen=True)
class Task:
  """A measurement's settings.

  Attributes:
    depth: depth of the ResNet v1, 6n+2.
    batch_size: images per step.
    seconds: about how long training and inference are measured, each.
  """

  depth: int
  batch_size: int
  seconds: float

  @property
  def blocks(self) -> int:
    """Residual blocks of each of the three stages."""
    return (self.depth - 2) // 6

  def batch(self) -> tuple[bytes, bytes]:
    """Makes the batch, which is the same in every program.

    Returns:
      The pixels of uint8[B, 32, 32, 3] noise, and uint8[B] labels below 10.
    """
    rng = random.Random(0)
    pixels = rng.randbytes(self.batch_size * math.prod(IMAGE_SHAPE))
    labels = [rng.randrange(NUM_CLASSES) for _ in range(self.batch_size)]
    return pixels, bytes(labels)


def task_from_arguments() -> Task:
  """Parses the command line of a worker."""
  parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
  parser.add_argument("--depth", type=int, default=20)
  parser.add_argument("--batch_size", type=int, default=32)
  parser.add_argument("--seconds", type=float, default=6.0)
  return Task(**vars(parser.parse_args()))


class Program(Protocol):
  """The program that a worker measures; see `report`."""

  def build(self) -> Callable[[int], float]:
    """Builds the network and the function that trains it."""

  def build_inference(self) -> Callable[[int], Any]:
    """Builds the function that predicts."""


def run(program_cls: Callable[[Task], Program], **arguments: Any) -> None:
  """Measures the task of the command line.

  Args:
    program_cls: makes the program from its task.
    **arguments: further arguments of `report`.
  """
  task = task_from_arguments()
  program = program_cls(task)
  report(
    task,
    build=program.build,
    build_inference=program.build_inference,
    **arguments,
  )


def report(
  task: Task,
  *,
  build: Callable[[], Callable[[int], float]],
  build_inference: Callable[[], Callable[[int], Any]],
  matmul: Callable[[int], Any],
  libraries: Sequence[str],
  threads: int,
  **extra: Any,
) -> None:
  """Measures a program and prints one line of JSON.

  A function that runs steps must return only when their results are ready.

  Args:
    task: the measurement's settings.
    build: builds the network; returns a function that takes a number of
      training steps and returns a finite loss. The loss may be the last step's
      or a mean, so programs cannot be compared by it.
    build_inference: called after training; returns a function that predicts
      the batch a given number of times.
    matmul: multiplies two float32 matrices of `MATMUL_SIZE` as many times.
    libraries: libraries whose versions are recorded.
    threads: number of threads that the framework uses.
    **extra: recorded unchanged.
  """
  started = time.perf_counter()
  train = build()
  train(1)
  compile_seconds = time.perf_counter() - started
  loss = 0.0

  def train_and_keep_loss(steps: int) -> None:
    nonlocal loss
    loss = train(steps)

  training = task.batch_size * _per_second(train_and_keep_loss, task.seconds)
  if not math.isfinite(loss):
    raise ArithmeticError(f"The loss must be finite, not {loss}.")
  peak = _peak_megabytes()
  predict = build_inference()
  inference = task.batch_size * _per_second(predict, task.seconds)
  matmuls = _per_second(matmul, _MATMUL_SECONDS)
  print(
    json.dumps(
      {
        "compile_seconds": compile_seconds,
        "train_images_per_second": training,
        "inference_images_per_second": inference,
        "matmul_gflops": matmuls * 2 * MATMUL_SIZE**3 / 1e9,
        "peak_megabytes": peak,
        "loss": loss,
        "python": platform.python_version(),
        "libraries": {
          name: importlib.metadata.version(name) for name in libraries
        },
        "threads": threads,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        **extra,
      }
    )
  )


def num_cpus() -> int:
  """Counts the CPUs that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _per_second(run: Callable[[int], Any], seconds: float) -> float:
  """Measures steps per second of `run(steps)`, after a warm-up."""
  run(_MIN_STEPS)
  # The number of steps is fixed beforehand. Waiting for each step's result to
  # read the clock would slow down programs that work ahead.
  per_second = _MIN_STEPS / _seconds(run, _MIN_STEPS)
  # Allocators need some time to settle; this also improves the estimate.
  steps = max(_MIN_STEPS, math.ceil(_WARM_UP * seconds * per_second))
  per_second = steps / _seconds(run, steps)
  steps = max(_MIN_STEPS, math.ceil(seconds * per_second))
  return steps / _seconds(run, steps)


def _seconds(run: Callable[[int], Any], steps: int) -> float:
  started = time.perf_counter()
  run(steps)
  return time.perf_counter() - started


def _peak_megabytes() -> float:
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Bytes on macOS, KiB elsewhere.
  return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
