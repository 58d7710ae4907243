"""Where the numbers of a run go: metrics.jsonl and TensorBoard."""

import contextlib
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from resnet_flax.run import errors, files as files_lib

Record = dict[str, Any]

_SPEED = ("epoch_seconds", "images_per_second")
# Measurements of the machine, which differ between bit-identical runs.
TIMED = (*_SPEED, "data_seconds", "evaluation_seconds")

# Bytes of the largest log to read; a thousand seeds write 0.5 MB an epoch.
_LARGEST = 1 << 32

# The metrics that can choose the best epoch, and whether higher is better.
MONITORED = {"accuracy": True, "loss": False, "objective": False}

# The metrics that a record must have for each network, and those that it must
# have, too, if its epoch was scored.
_TRAIN = ("train_loss", "train_accuracy")
_SCORES = tuple(f"test_{name}" for name in MONITORED)


class MetricsLog:
  """The file metrics.jsonl: one JSON object for each finished epoch.

  With the run's `config`, `read` checks that each seed has its metrics.
  """

  def __init__(self, workdir: pathlib.Path, config: ConfigDict | None = None):
    self._path = workdir / "metrics.jsonl"
    self._seeds, self._every = range(0), 1
    if config is not None:
      self._every = config.eval_every_epochs
      self._seeds = range(config.seed, config.seed + config.num_seeds)

  def read(self, steps_per_epoch: int | None = None) -> list[Record]:
    """The records so far, oldest first; a torn last line is left out.

    `steps_per_epoch` is by default the `step` of the first record.
    """
    try:
      content = files_lib.read_bytes(self._path, _LARGEST)
    except FileNotFoundError:
      return []
    except (OSError, ValueError) as error:
      raise errors.WorkdirError(
        f"{self._path} cannot be read: {error}. Restore it, or use another"
        " workdir."
      ) from error
    lines = content.removesuffix(b"\n").split(b"\n")
    records: list[Record] = []
    for epoch, line in enumerate(lines):
      try:
        record = files_lib.parse_object(line)
      except ValueError as error:
        if epoch == len(lines) - 1:
          break  # A killed run was writing it, or the disk lost a part of it.
        fault = f"it is not a JSON object ({error})"
      else:
        fault = self._fault(record, epoch, steps_per_epoch)
      if fault:
        raise errors.WorkdirError(
          f"{self._path}, line {epoch + 1}: {fault}. Restore it, or use another"
          " workdir."
        )
      steps_per_epoch = steps_per_epoch or record["step"]
      records.append(record)
    return records

  def _fault(
    self, record: Record, epoch: int, steps_per_epoch: int | None
  ) -> str:
    """What is wrong with the record of an epoch; '' if nothing is."""
    of_seeds = record.get("seeds", [])
    if not isinstance(of_seeds, list):
      return "seeds must be a list"
    top_level = {key: value for key, value in record.items() if key != "seeds"}
    seeds = list(self._seeds)
    scores = _SCORES if (epoch + 1) % self._every == 0 else ()
    names = (*_TRAIN, *scores) if seeds else ()
    needed = (*names, *_SPEED) if seeds else ()
    parts = [(top_level, ("epoch", "step", *needed))]
    parts += [(each, ("seed", *names)) for each in of_seeds]
    for part, keys in parts:
      if not isinstance(part, dict):
        return "each of seeds must be a JSON object"
      values: dict[str, Any] = dict.fromkeys(keys)
      for key, value in (values | part).items():
        must_be_positive = key in ("step", "epoch_seconds")
        # JSON may have NaN, and integers that are too large for a float.
        if (
          type(value) not in (int, float)
          or not abs(value) <= sys.float_info.max
          or (value <= 0 and must_be_positive)
        ):
          above = " above 0" * must_be_positive
          return f"{key}={value!r:.100} must be a finite number{above}"
    recorded = [each["seed"] for each in of_seeds]
    if seeds and recorded != (seeds if seeds[1:] else []):
      return f"it has the seeds {recorded}, not {seeds}"
    step = (epoch + 1) * (steps_per_epoch or record["step"])
    if (record["epoch"], record["step"]) != (epoch, step):
      return (
        f"epoch={record['epoch']} and step={record['step']}, not {epoch} and"
        f" {step}"
      )
    return ""

  def drop_after(
    self, step: int, steps_per_epoch: int, *, fallen_back: bool
  ) -> list[Record]:
    """Drops the records of epochs that end after the restored step.

    Returns the others; an epoch that was trained but not evaluated has none.
    If a run has `fallen_back` to an earlier checkpoint, many may be dropped.
    """
    records = self.read(steps_per_epoch)
    epochs, within = divmod(step, steps_per_epoch)
    too_few = len(records) < (epochs if within else epochs - 1)
    # A record may reach the disk before the checkpoint of its epoch, but not
    # before the checkpoint of the previous epoch.
    if too_few or (len(records) > epochs + 1 and not fallen_back):
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
    """Adds an epoch's record on disk; `ValueError` if a float is not finite."""
    for key, value in record.items():
      if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} is {value}")
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with open(os.open(self._path, flags, 0o666), "a") as file:
      file.write(json.dumps(record) + "\n")
      file.flush()
      os.fsync(file.fileno())


def summarize(
  seeds: Sequence[int], of_seeds: Sequence[Record], ensemble: Record
) -> Record:
  """The metrics of an epoch, from the metrics of its networks.

  One network's metrics are taken as they are. Several networks give means,
  sample standard deviations as NAME_std (except of the learning rate),
  `ensemble`, and under 'seeds' the metrics of each.
  """
  if len(seeds) == 1:
    return of_seeds[0]
  record: Record = {}
  for name in of_seeds[0]:
    values = [values[name] for values in of_seeds]
    record[name] = statistics.fmean(values)
    if name != "learning_rate":
      record[f"{name}_std"] = statistics.stdev(values)
  pairs = zip(seeds, of_seeds, strict=True)
  by_seed = [{"seed": seed} | values for seed, values in pairs]
  return record | ensemble | {"seeds": by_seed}


def of_seeds(record: Record) -> list[Record]:
  """A record for each network: its metrics and the numbers that all share."""
  if "seeds" not in record:
    return [record]
  shared = ("epoch", "step", *TIMED)
  common = {key: record[key] for key in shared if key in record}
  return [common | values for values in record["seeds"]]


def best_records(records: Sequence[Record], monitor: str) -> list[Record]:
  """The record of each network's best epoch; [] if no epoch was scored."""
  networks = zip(*map(of_seeds, records), strict=True)
  best = [best_record(list(each), monitor) for each in networks]
  return [each for each in best if monitored(each, monitor) in each]


def best_record(records: list[Record], monitor: str) -> Record:
  """One network's best record by `monitor`, a name of `MONITORED`.

  Of equal records the first (see `comparable`); the last if none is scored.
  """
  best = max if MONITORED[monitor] else min
  scored = [each for each in records if monitored(each, monitor) in each]
  if not scored:
    return records[-1]
  key = monitored(scored[0], monitor)
  return best(scored, key=lambda record: comparable(record[key]))


def comparable(value: float) -> float:
  """A score in six digits: eval_batch_size may change the digits after them."""
  return float(f"{value:.6g}")


def monitored(record: Mapping[str, Any], monitor: str) -> str:
  """The key of the score to choose by: validation's if the record has it."""
  validation = f"val_{monitor}"
  return validation if validation in record else f"test_{monitor}"


class TensorBoard:
  """TensorBoard event files, written without TensorFlow; a context manager.

  The run starts after `step` steps: older events from there on are superseded.
  """

  def __init__(self, workdir: pathlib.Path, step: int):
    events = workdir / "tensorboard" / "events"
    events.parent.mkdir(exist_ok=True)
    # Not SummaryWriter: its thread would die on a full disk, unnoticed, and
    # later writes would wait for it for ever. The suffix distinguishes files
    # of the same second.
    suffix = f".{os.getpid()}.{time.monotonic_ns()}"
    self._writer = EventsWriter(str(events), suffix)
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write_event(step, session_log=start)

  def _write_event(self, step: int, **content: Any) -> None:
    event = event_pb2.Event(step=step, wall_time=time.time(), **content)
    self._writer.write_event(event)

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
    """Writes numbers by their tags, after `step` steps; may raise OSError."""
    scalars = [
      summary_pb2.Summary.Value(tag=tag, simple_value=value)
      for tag, value in values.items()
    ]
    self._write_event(step, summary=summary_pb2.Summary(value=scalars))
    self._writer.flush()

  def __enter__(self) -> "TensorBoard":
    return self

  def __exit__(self, kind: Any, *exception: object) -> None:
    already_reported = (OSError,) if kind else ()  # Such as a full disk.
    with contextlib.suppress(*already_reported):
      self._writer.close()


def seed_tag(seed: int, tag: str) -> str:
  """The TensorBoard tag for a number of one seed, in a run of several."""
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
