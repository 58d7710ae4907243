"""Where the numbers of a run go: metrics.jsonl and TensorBoard."""

import json
import math
import os
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from resnet_flax.run import errors, files as files_lib

Record = dict[str, Any]

# What is measured of the machine; it differs between bit-identical runs.
TIMED = ("epoch_seconds", "images_per_second")

# What can choose the best epoch, and whether more of it is better.
MONITORED = {"accuracy": True, "loss": False, "objective": False}

# An epoch's checkpoint may still be on its way to the disk when its record is
# written, but not that of the epoch before.
_MOST_AHEAD = 1


class MetricsLog:
  """The file metrics.jsonl: one JSON object for each finished epoch."""

  def __init__(self, workdir: pathlib.Path):
    self._path = workdir / "metrics.jsonl"

  def read(self) -> list[Record]:
    """The records so far, oldest first; a torn last line is left out."""
    if not self._path.exists():
      return []
    records = []
    for line in self._path.read_bytes().splitlines(keepends=True):
      try:
        if not line.endswith(b"\n"):
          break  # A killed run was writing it.
        records.append(json.loads(line))
      except ValueError:
        break  # The disk lost its end.
    return records

  def cut_back(
    self, step: int, steps_per_epoch: int, *, fallen_back: bool
  ) -> list[Record]:
    """Drops the records of epochs that end after the restored step.

    Returns:
      The records that are kept. Where the last epoch was trained but not
      evaluated yet, there is one less than epochs.

    Raises:
      WorkdirError: there are fewer records than epochs, or more of them than
        a killed run can have written ahead of its checkpoint.
    """
    records = self.read()
    epochs, within = divmod(step, steps_per_epoch)
    least = epochs - (not within and epochs > 0)
    if not least <= len(records) or (
      len(records) > epochs + _MOST_AHEAD and not fallen_back
    ):
      raise errors.WorkdirError(
        f"{self._path} has {len(records)} epochs but the latest checkpoint has"
        f" {epochs}: files are missing or were changed. Restore them, or"
        " start again in another --workdir."
      )
    kept = records[:epochs]
    content = "".join(json.dumps(record) + "\n" for record in kept).encode()
    if self._path.exists() and self._path.read_bytes() != content:
      files_lib.write_file(self._path, content)
    return kept

  def append(self, record: Record) -> None:
    """Adds the record of an epoch and sees that it reaches the disk."""
    for key, value in record.items():
      if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}")
    with self._path.open("a") as file:
      file.write(json.dumps(record) + "\n")
      file.flush()
      os.fsync(file.fileno())


def summarize(
  first: Record,
  seeds: Sequence[int],
  of_seeds: Sequence[Record],
  ensemble: Record,
) -> Record:
  """The record of an epoch of one or several networks.

  Returns:
    Of one network its metrics. Of several their means, under NAME_std their
    sample standard deviations (but of the learning rate), and under 'seeds'
    the metrics of each.
  """
  if len(seeds) == 1:
    return first | of_seeds[0]
  record = dict(first)
  for name in of_seeds[0]:
    values = [values[name] for values in of_seeds]
    record[name] = statistics.fmean(values)
    if name != "learning_rate":
      record[f"{name}_std"] = statistics.stdev(values)
  each = [
    {"seed": seed} | values
    for seed, values in zip(seeds, of_seeds, strict=True)
  ]
  return record | ensemble | {"seeds": each}


def of_seeds(record: Record) -> list[Record]:
  """The records of an epoch's networks, each as if it were alone."""
  if "seeds" not in record:
    return [record]
  common = {key: record[key] for key in ("epoch", "step", *TIMED)}
  return [common | values for values in record["seeds"]]


def best_records(records: Sequence[Record], monitor: str) -> list[Record]:
  """The record of each network's best epoch; none if there is no epoch."""
  networks = zip(*map(of_seeds, records), strict=True)
  return [best_record(list(each), monitor) for each in networks]


def best_record(records: list[Record], monitor: str) -> Record:
  """The best of one network's records, by a name of `MONITORED`.

  Of equally good ones the first.
  """
  sign = 1 if MONITORED[monitor] else -1
  return max(
    records, key=lambda record: sign * record[monitored(record, monitor)]
  )


def monitored(record: Mapping[str, Any], monitor: str) -> str:
  """The key that chooses the best epoch: validation's if there is one."""
  validation = f"val_{monitor}"
  return validation if validation in record else f"test_{monitor}"


class TensorBoard:
  """TensorBoard event files, written without TensorFlow; a context manager.

  Args:
    workdir: gets the folder `tensorboard`.
    step: steps done where the run resumes; later events are superseded.
  """

  def __init__(self, workdir: pathlib.Path, step: int):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2

    events = workdir / "tensorboard" / "events"
    events.parent.mkdir(exist_ok=True)
    # Not SummaryWriter: its thread would die on a full disk, unnoticed, and
    # later writes would wait for it for ever. The process's number tells apart
    # files of one second.
    self._writer = EventsWriter(str(events), f".{os.getpid()}")
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._writer.write_event(
      event_pb2.Event(step=step, wall_time=time.time(), session_log=start)
    )

  def write(self, record: Record) -> None:
    """Writes the metrics of an epoch at its step; may raise OSError."""
    values = _tagged(record)
    for of_seed in record.get("seeds", []):
      values |= {
        seed_tag(of_seed["seed"], tag): value
        for tag, value in _tagged(of_seed).items()
      }
    self.write_scalars(record["step"], values)

  def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes numbers by their tags after so many steps; may raise OSError."""
    from tensorboardX.proto import event_pb2, summary_pb2

    summary = [
      summary_pb2.Summary.Value(tag=tag, simple_value=value)
      for tag, value in values.items()
    ]
    self._writer.write_event(
      event_pb2.Event(
        step=step,
        wall_time=time.time(),
        summary=summary_pb2.Summary(value=summary),
      )
    )
    self._writer.flush()

  def __enter__(self) -> "TensorBoard":
    return self

  def __exit__(self, *exception: object) -> None:
    try:
      self._writer.close()
    except OSError:
      # A disk that is full is being reported already.
      if exception == (None, None, None):
        raise


def seed_tag(seed: int, tag: str) -> str:
  """TensorBoard's tag for a number of one of several networks."""
  return f"seed_{seed}/{tag}"


def _tagged(record: Record) -> dict[str, float]:
  """Numbers by TensorBoard's tags, grouped by split: train/loss, ..."""
  values = {}
  for key, value in record.items():
    if key not in ("step", "seed", "seeds"):
      split, _, metric = key.partition("_")
      grouped = split in ("train", "test", "val")
      values[f"{split}/{metric}" if grouped else f"run/{key}"] = value
  return values
