"""Where the numbers of a run go: metrics.jsonl and TensorBoard."""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from resnet_flax import errors

Record = dict[str, Any]

# A record is written before its checkpoint, and that of the epoch before may
# still be on its way to the disk.
_MOST_AHEAD = 2


class MetricsLog:
  """The file metrics.jsonl: one JSON object for each finished epoch."""

  def __init__(self, workdir: pathlib.Path):
    self._path = workdir / "metrics.jsonl"

  def read(self) -> list[Record]:
    """The records so far, oldest first; a torn last line is left out."""
    if not self._path.exists():
      return []
    records = []
    for line in self._path.read_text().splitlines():
      try:
        records.append(json.loads(line))
      except ValueError:
        break  # A killed run was writing it.
    return records

  def truncate(self, num_epochs: int) -> list[Record]:
    """Keeps the records of the first epochs, as many as were saved.

    Args:
      num_epochs: epochs whose result is in the checkpoint.

    Returns:
      The records that are kept.

    Raises:
      WorkdirError: there are fewer records than epochs, or more of them than
        a killed run can have written ahead of its checkpoint.
    """
    records = self.read()
    ahead = len(records) - num_epochs
    if not 0 <= ahead <= _MOST_AHEAD:
      raise errors.WorkdirError(
        f"{self._path} has {len(records)} epochs but the latest checkpoint has"
        f" {num_epochs}: files are missing or were changed. Restore them, or"
        " start again in another --workdir."
      )
    kept = records[:num_epochs]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if self._path.exists() and self._path.read_text() != text:
      temporary = self._path.with_suffix(".tmp")
      temporary.write_text(text)
      os.replace(temporary, self._path)
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


def best_record(records: list[Record]) -> Record:
  """The record of the best epoch; of equally good ones the first.

  Args:
    records: at least one.
  """
  return max(records, key=lambda record: record[monitored(record)])


def monitored(record: Mapping[str, Any]) -> str:
  """The metric that chooses the best epoch: validation if there is one."""
  return "val_accuracy" if "val_accuracy" in record else "test_accuracy"


class TensorBoard:
  """TensorBoard event files, written without TensorFlow.

  Args:
    workdir: gets the folder `tensorboard`.
    step: the step that the run goes on from; later events are superseded.
    enabled: if not, nothing is written.
  """

  def __init__(self, workdir: pathlib.Path, step: int, enabled: bool):
    self._writer: Any = None
    if enabled:
      import tensorboardX

      self._writer = tensorboardX.SummaryWriter(
        str(workdir / "tensorboard"), purge_step=step + 1
      )

  def write(self, record: Record) -> None:
    """Writes the metrics of an epoch at its step."""
    if self._writer is None:
      return
    for key, value in record.items():
      if key != "step":
        # Grouped by split: train/loss, test/accuracy, ...
        split, _, metric = key.partition("_")
        grouped = split in ("train", "test", "val")
        tag = f"{split}/{metric}" if grouped else f"run/{key}"
        self._writer.add_scalar(tag, value, record["step"])
    self._writer.flush()

  def close(self) -> None:
    """Closes the event file."""
    if self._writer is not None:
      self._writer.close()
