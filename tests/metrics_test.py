import json
import pathlib

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from resnet_flax import errors, metrics

RECORD = {"epoch": 0, "step": 4, "train_loss": 1.5, "test_accuracy": 0.5}


@pytest.fixture
def log(tmp_path):
  return metrics.MetricsLog(tmp_path)


def test_append_and_read(log):
  assert log.read() == []
  log.append(RECORD)
  log.append({**RECORD, "epoch": 1})
  assert [record["epoch"] for record in log.read()] == [0, 1]


def test_torn_line_is_left_out(log, tmp_path):
  log.append(RECORD)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"epoch": 1, "ste')
  assert log.read() == [RECORD]
  # The next record does not run into the torn one.
  log.truncate(1)
  log.append({**RECORD, "epoch": 1})
  assert len(log.read()) == 2


def test_truncate(log):
  for epoch in range(3):
    log.append({**RECORD, "epoch": epoch})
  assert [record["epoch"] for record in log.truncate(2)] == [0, 1]
  assert len(log.read()) == 2
  assert log.truncate(0) == log.read() == []


def test_truncate_refuses_to_leave_a_gap(log):
  log.append(RECORD)
  with pytest.raises(errors.WorkdirError, match="has 1 epochs but"):
    log.truncate(2)
  assert log.read() == [RECORD]


def test_truncate_refuses_to_lose_a_run(log):
  """As when the checkpoints were not copied along."""
  for epoch in range(4):
    log.append({**RECORD, "epoch": epoch})
  with pytest.raises(errors.WorkdirError, match="has 4 epochs but"):
    log.truncate(0)
  assert len(log.read()) == 4


def test_truncate_makes_no_file(log, tmp_path):
  assert log.truncate(0) == []
  assert list(tmp_path.iterdir()) == []


def test_not_a_number_is_never_written(log):
  with pytest.raises(ValueError, match="train_loss is nan"):
    log.append({**RECORD, "train_loss": float("nan")})
  assert log.read() == []


def test_best_record():
  records = [{"epoch": k, "test_accuracy": a} for k, a in enumerate([1, 3, 3])]
  # Of two equally good ones the first.
  assert metrics.best_record(records)["epoch"] == 1
  for record, value in zip(records, [9, 1, 1], strict=True):
    record["val_accuracy"] = value
  assert metrics.best_record(records)["epoch"] == 0


def events(folder):
  """(step, tag, value) of every scalar in the event files of a folder."""
  found = []
  for path in sorted(pathlib.Path(folder).iterdir()):
    raw, position = path.read_bytes(), 0
    while position < len(raw):
      # TFRecord: length, its checksum, data, its checksum.
      length = int(np.frombuffer(raw, np.uint64, 1, position)[0])
      event = event_pb2.Event.FromString(raw[position + 12 :][:length])
      found += [
        (event.step, v.tag, v.simple_value) for v in event.summary.value
      ]
      position += 16 + length
  return found


def test_tensorboard(tmp_path):
  board = metrics.TensorBoard(tmp_path, 0, enabled=True)
  board.write(RECORD)
  board.close()
  assert sorted(events(tmp_path / "tensorboard")) == [
    (4, "run/epoch", 0.0),
    (4, "test/accuracy", 0.5),
    (4, "train/loss", 1.5),
  ]


def test_tensorboard_off(tmp_path):
  board = metrics.TensorBoard(tmp_path, 0, enabled=False)
  board.write(RECORD)
  board.close()
  assert list(tmp_path.iterdir()) == []


def test_records_are_lines_of_json(log, tmp_path):
  log.append(RECORD)
  (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert json.loads(line) == RECORD
