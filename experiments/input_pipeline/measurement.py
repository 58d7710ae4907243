"""What is measured; apart from the program, so that processes can import it."""

import itertools
import multiprocessing
import pathlib
import pickle
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from resnet_flax import datasets, epochs
from resnet_flax.datasets import streaming

_BATCH = 16
# As one, so that what is timed is more than what is decoded ahead.
_EPOCHS = 5


def _decode_alone(
  split: streaming.StreamedSplit, positions: np.ndarray, conn: Any
) -> None:
  """Decodes and cuts images in a plain loop, and says how long it took."""
  records = streaming._Records(split.shards, split.indices, [positions])
  decoding = streaming._Decoding(
    split.image_size, split.num_classes, split.crop, datasets.Draw(0, 0)
  )
  # Read beforehand: it is decoding alone that is timed.
  positions, raw = records[0]
  # What is imported and set up once is not.
  decoding(streaming._Encoded(positions[:16], raw[:16]))
  conn.send("ready")
  conn.recv()
  started = time.perf_counter()
  cpu = time.process_time()
  # As long as the pipeline: processors are faster for the first seconds.
  for start in list(range(0, len(raw), 16)) * _EPOCHS:
    part = slice(start, start + 16)
    decoding(streaming._Encoded(positions[part], raw[part]))
  conn.send((time.perf_counter() - started, time.process_time() - cpu))


def alone(split: streaming.StreamedSplit, workers: int) -> dict[str, float]:
  """Plain loops in as many processes as the pipeline has workers."""
  context = multiprocessing.get_context("spawn")
  processes = []
  for positions in np.array_split(np.arange(len(split)), workers):
    ours, theirs = context.Pipe()
    process = context.Process(
      target=_decode_alone, args=(split, positions, theirs)
    )
    process.start()
    processes.append((process, ours))
  for _, conn in processes:
    conn.recv()
  for _, conn in processes:
    conn.send("go")
  times = [conn.recv() for _, conn in processes]
  images = _EPOCHS * len(split)
  for process, _ in processes:
    process.join()
  return {
    "images_per_second": images / max(wall for wall, _ in times),
    "cpu_ms_per_image": 1000 * sum(cpu for _, cpu in times) / images,
  }


def memory() -> float:
  """MB of this process and those it started; shared pages in proportion."""
  children = multiprocessing.active_children()
  total = 0
  for pid in ["self", *(child.pid for child in children)]:
    text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
    line = next(line for line in text.splitlines() if line.startswith("Pss:"))
    total += int(line.split()[1])
  return total / 1024


def _cpu_seconds() -> float:
  """Of this process and of those it started and that still run."""
  total = time.process_time()
  for child in multiprocessing.active_children():
    fields = pathlib.Path(f"/proc/{child.pid}/stat").read_text()
    user, system = fields.rpartition(")")[2].split()[11:13]
    total += (int(user) + int(system)) / 100
  return total


def pipeline(split: streaming.StreamedSplit, round_: int) -> dict[str, float]:
  """Some epochs; timed after the first batches, which wait for workers.

  Args:
    split: what is read.
    round_: draws other epochs.

  Returns:
    Images/s, CPU time for an image, and the time until the first batch.
  """
  order = _order(split, range(_EPOCHS * round_, _EPOCHS * (round_ + 1)))
  started = time.perf_counter()
  batches = split.batches(order, datasets.Draw(0, round_))
  first = next(batches)
  waited = time.perf_counter() - started
  # More than is decoded ahead, which is the same before and after.
  warm_up = 16
  for _ in itertools.islice(batches, warm_up - 1):
    pass
  timed = len(order) - 2 * warm_up
  started, cpu = time.perf_counter(), _cpu_seconds()
  for _ in itertools.islice(batches, timed):
    pass
  seconds, cpu = time.perf_counter() - started, _cpu_seconds() - cpu
  # Workers that are done end, and their times with them.
  remaining = sum(1 for _ in batches)
  assert remaining == warm_up
  images = timed * len(first[0])
  return {
    "images_per_second": images / seconds,
    "cpu_ms_per_image": 1000 * cpu / images,
    "first_batch_seconds": waited,
  }


def around_decoding(split: streaming.StreamedSplit) -> dict[str, float]:
  """CPU time for an image of what is done besides decoding it, in ms.

  Returns:
    `read`: its record, from a file that is in memory. `pack`: it, to be sent to
    another process, and unpacking it there; not the way.
  """
  count = min(len(split), 512)
  chunks = np.array_split(np.arange(count), count // _BATCH)
  records = streaming._Records(split.shards, split.indices, chunks)
  records[0]  # Opens the files.
  started = time.process_time()
  for chunk in range(len(chunks)):
    records[chunk]
  read = time.process_time() - started
  images = np.zeros((_BATCH, *split.image_shape), np.uint8)
  started = time.process_time()
  for _ in chunks:
    pickle.loads(pickle.dumps((images, np.zeros(_BATCH, np.int32))))
  pack = time.process_time() - started
  return {"read": 1000 * read / count, "pack": 1000 * pack / count}


def memory_over_epochs(
  split: streaming.StreamedSplit, num_epochs: int
) -> list[list[float]]:
  """MB of all processes, up to ten times in an epoch; workers start once."""
  order = _order(split, range(num_epochs))
  per_epoch = len(order) // num_epochs
  batches = split.batches(order, datasets.Draw(0, 0))
  samples: list[list[float]] = [[] for _ in range(num_epochs)]
  for step, _ in enumerate(batches):
    # Not while workers start, nor while they end.
    within = step % per_epoch
    if within % -(-per_epoch // 10) == per_epoch // 20:
      samples[step // per_epoch].append(memory())
  return samples


def _order(
  split: streaming.StreamedSplit, which: Iterable[int]
) -> list[np.ndarray]:
  """The batches of some epochs, one after the other."""
  return [
    positions
    for epoch in which
    for positions in epochs.order(len(split), _BATCH, 0, epoch)
  ]
