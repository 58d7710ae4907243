"""Code of all workers; needs only NumPy, as their environments differ.

A worker builds its program, warms it up and prints one line of JSON about it.
Then it waits. For each line of its input, such as "train 8", it measures a
window of about so many seconds and prints a line of JSON.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

NUM_CLASSES = 10
IMAGE_SHAPE = (32, 32, 3)
MATMUL_SIZE = 1024
_MIN_STEPS = 3
# Allocators need some time to settle; this also gives a first speed.
_WARM_UP_SECONDS = 2.0
# A window has this many times the steps of the highest speed so far; it is too
# short only if its own speed is higher still.
_MARGIN = 1.05


@dataclasses.dataclass(frozen=True)
class Task:
  """What a worker measures."""

  depth: int = 20  # 6n+2 layers of ResNet v1.
  batch_size: int = 32
  threads: int = 1  # The framework's threads.
  dtype: str = "float32"  # Or "bfloat16".
  mode: str = "usual"  # A program's `mode`.

  @property
  def blocks(self) -> int:
    """Residual blocks of each of the three stages."""
    return (self.depth - 2) // 6

  def batch(self) -> tuple[np.ndarray, np.ndarray]:
    """Noise, uint8[B, 32, 32, 3], and labels, int32[B]; the same for all."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (self.batch_size, *IMAGE_SHAPE), np.uint8)
    return images, rng.integers(0, NUM_CLASSES, self.batch_size, np.int32)


def digest(images: np.ndarray, labels: np.ndarray) -> str:
  """Identifies a batch in any order of its images.

  Images are [B, 32, 32, 3], with integers of any dtype; labels [B].
  """
  rows = np.concatenate(
    [images.reshape(len(labels), -1), labels.reshape(-1, 1)], axis=1
  ).astype(np.uint8)
  return hashlib.sha256(b"".join(sorted(map(bytes, rows)))).hexdigest()


class Program(Protocol):
  """The program of a worker."""

  @property
  def libraries(self) -> Sequence[str]:
    """The libraries whose versions are recorded."""

  def build(self) -> dict[str, Callable[[int], float | None]]:
    """Builds the network; returns a function for each kind of window.

    A function runs a number of steps and returns when the results are ready.
    The first, "train", returns a finite loss. It may be the last step's loss or
    a mean, so it cannot compare programs.
    """

  def facts(self) -> dict[str, Any]:
    """Facts from the framework: parameters, batch, threads."""


def serve(program_cls: Callable[[Task], Program]) -> None:
  """Measures the task of the command line, as often as asked."""
  parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
  for field in dataclasses.fields(Task):
    parser.add_argument(
      f"--{field.name}", type=type(field.default), default=field.default
    )
  task = Task(**vars(parser.parse_args()))
  # Libraries print to stderr, since stdout has only answers.
  output = os.fdopen(os.dup(sys.stdout.fileno()), "w")
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  for answer in answers(program_cls(task), sys.stdin):
    print(json.dumps(answer), file=output, flush=True)


def answers(
  program: Program, requests: Iterable[str], warm_up: float = _WARM_UP_SECONDS
) -> Iterator[dict[str, Any]]:
  """Yields the facts about a program, then one answer to each request.

  Each kind of window is warmed up for `warm_up` seconds.
  """
  started = time.perf_counter()
  functions = program.build()
  functions["train"](1)
  build_seconds = time.perf_counter() - started
  fastest: dict[str, float] = dict.fromkeys(functions, 0.0)

  def window(kind: str, seconds: float) -> dict[str, Any]:
    run = functions[kind]
    # These steps refill the processor's caches after another program's turn.
    run(_MIN_STEPS)
    # The number of steps is fixed beforehand. Waiting for each step's result to
    # read the clock would slow down programs that work ahead.
    steps = max(_MIN_STEPS, math.ceil(_MARGIN * seconds * fastest[kind]))
    started, used = time.perf_counter(), time.process_time()
    loss = run(steps)
    seconds = time.perf_counter() - started
    fastest[kind] = max(fastest[kind], steps / seconds)
    if loss is not None and not math.isfinite(loss):
      raise ArithmeticError(f"The loss must be finite, not {loss}.")
    return {
      "steps": steps,
      "seconds": seconds,
      "cpu_seconds": time.process_time() - used,
      **({} if loss is None else {"loss": loss}),
    }

  for kind in functions:
    window(kind, 0)
    window(kind, warm_up)
    if kind == "train":
      peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  yield {
    "kinds": list(functions),
    "build_seconds": build_seconds,
    # Bytes on macOS, KiB elsewhere.
    "peak_megabytes": peak * (1 if sys.platform == "darwin" else 1024) / 1e6,
    "huge_page_megabytes": _huge_page_megabytes(),
    "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    "python": platform.python_version(),
    "libraries": {
      name: importlib.metadata.version(name) for name in program.libraries
    },
    **program.facts(),
  }
  for request in requests:
    kind, seconds = request.split()
    yield {"kind": kind, **window(kind, float(seconds))}


def _huge_page_megabytes() -> float | None:
  """The memory of this process in huge pages; None where it is not known."""
  try:
    lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
  except OSError:
    return None
  (line,) = (line for line in lines if line.startswith("AnonHugePages:"))
  return int(line.split()[1]) * 1024 / 1e6
