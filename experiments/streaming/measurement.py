"""The measurements, in a module that worker processes can import."""

import dataclasses
import itertools
import multiprocessing
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.tools import markdown
from resnet_flax import data as datasets
from resnet_flax.data import streaming
from resnet_flax.parallel import program

# Worker processes or threads of the training process decode the images.
WAYS = ("workers", "threads")
_BATCH = 128
# More images than two workers decode ahead.
_WARM_UP = 1024


class Alone:
  """Processes that decode and cut images in plain loops.

  The images are read into memory beforehand.
  """

  def __init__(self, split: streaming.StreamedSplit, num_processes: int):
    context = multiprocessing.get_context("spawn")
    self._processes = []
    for positions in np.array_split(np.arange(len(split)), num_processes):
      conn, worker_conn = context.Pipe()
      process = context.Process(
        target=_decode, args=(split, positions, worker_conn), daemon=True
      )
      process.start()
      self._processes.append((process, conn))
    for _, conn in self._processes:
      conn.recv()

  def measure(self, num_images: int) -> dict[str, float]:
    """Decodes about `num_images` images in all processes together."""
    # Processors are faster in the first seconds; the pipeline warms up, too.
    count = len(self._processes)
    self._decode(_WARM_UP // count)
    times = self._decode(num_images // count)
    images = num_images // count * count
    return {
      "images_per_second": images / max(wall for wall, _ in times),
      "cpu_ms_per_image": 1000 * sum(cpu for _, cpu in times) / images,
    }

  def _decode(self, count: int) -> list[tuple[float, float]]:
    """Decodes `count` images per process; returns (seconds, CPU seconds)."""
    for _, conn in self._processes:
      conn.send(count)
    return [conn.recv() for _, conn in self._processes]

  def close(self) -> None:
    """Ends the processes."""
    for process, conn in self._processes:
      conn.send(0)
      process.join()


def _decode(
  split: streaming.StreamedSplit, positions: np.ndarray, conn: Any
) -> None:
  """Decodes as many images as requested and sends the time that it took."""
  raw = split.source.examples(split.indices[positions])
  draw, number = datasets.Draw(0, 0), itertools.count()
  # Imports and setup happen here once, outside the timing.
  split._decode(draw, positions[0], raw[0])
  conn.send("ready")
  while count := conn.recv():
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
      k = next(number) % len(raw)
      split._decode(draw, positions[k], raw[k])
    conn.send((time.perf_counter() - started, time.process_time() - cpu))


class Pipeline:
  """The input pipeline's batches over many epochs."""

  def __init__(self, split: streaming.StreamedSplit, way: str):
    if way == "threads":
      split = dataclasses.replace(split, num_workers=0)
    self._batches = split.batches(
      _order(split, range(200)), datasets.Draw(0, 0)
    )

  def measure(self, num_images: int) -> dict[str, float]:
    """Times about `num_images` images, after using up images decoded ahead."""
    self._take(_WARM_UP)
    started, cpu = time.perf_counter(), _cpu_seconds()
    images = self._take(num_images)
    seconds, cpu = time.perf_counter() - started, _cpu_seconds() - cpu
    # The workers fill their buffers now, not while something else is timed.
    time.sleep(2)
    return {
      "images_per_second": images / seconds,
      "cpu_ms_per_image": 1000 * cpu / images,
    }

  def _take(self, num_images: int) -> int:
    """Takes at least `num_images` images and returns their number."""
    taken = 0
    while taken < num_images:
      taken += len(next(self._batches)[0])
    return taken

  def close(self) -> None:
    """Ends the workers."""
    self._batches.close()  # type: ignore[attr-defined]


def memory() -> float:
  """MiB of this process and its children, with shared pages in proportion."""
  children = multiprocessing.active_children()
  total = 0
  for pid in ["self", *(child.pid for child in children)]:
    text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    line = next(line for line in text.splitlines() if line.startswith("Pss:"))
    total += int(line.split()[1])
  return total / 1024


def _cpu_seconds() -> float:
  """CPU seconds of this process and of its running children."""
  total = time.process_time()
  for child in multiprocessing.active_children():
    fields = pathlib.Path(f"/proc/{child.pid}/stat").read_text()
    user, system = fields.rpartition(")")[2].split()[11:13]
    total += (int(user) + int(system)) / 100
  return total


def memory_over_epochs(
  split: streaming.StreamedSplit, num_epochs: int
) -> list[list[float]]:
  """Reads MiB of all processes up to ten times an epoch; workers start once."""
  order = _order(split, range(num_epochs))
  per_epoch = len(order) // num_epochs
  batches = split.batches(order, datasets.Draw(0, 0))
  samples: list[list[float]] = [[] for _ in range(num_epochs)]
  for step, _ in enumerate(batches):
    # From 20 steps an epoch on, no reading is at an epoch's first step.
    within = step % per_epoch
    if within % -(-per_epoch // 10) == per_epoch // 20:
      samples[step // per_epoch].append(memory())
  return samples


def _order(
  split: streaming.StreamedSplit, epochs: Iterable[int]
) -> list[np.ndarray]:
  """The batches of several epochs, one after the other."""
  return [
    positions
    for epoch in epochs
    for positions in program.order(len(split), _BATCH, 0, epoch)
  ]


def table(
  rounds: Sequence[dict[str, Any]], memory: Sequence[Sequence[float]]
) -> str:
  """Formats results as Markdown, with the memory of `memory_over_epochs`.

  For each of `WAYS`, a round has the result of `Alone.measure` as `alone`, and
  the result of `Pipeline.measure`, right after it, as `pipeline`.
  """
  rows: list[tuple[str, Sequence[float], str]] = []
  for key, title, form in (
    ("images_per_second", "images/s", ".0f"),
    ("cpu_ms_per_image", "CPU time for an image, ms", ".2f"),
  ):
    alone = [each[way]["alone"][key] for each in rounds for way in each]
    rows.append((f"alone, {title}", alone, form))
    for way in WAYS:
      samples = [each[way]["pipeline"][key] for each in rounds]
      rows.append((f"{way}, {title}", samples, form))
    for way in WAYS:
      ratios = [
        each[way]["pipeline"][key] / each[way]["alone"][key] for each in rounds
      ]
      rows.append((f"{way} / alone, {title}", ratios, ".3f"))
  rows += [
    (f"memory of all processes in epoch {epoch}, MiB", samples, ".0f")
    for epoch, samples in enumerate(memory)
  ]
  return markdown.spread_table(rows)
