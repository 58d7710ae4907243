import json
import pathlib

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from configs import base
from resnet_flax.run import errors, metrics
from tests.run import damage

RECORD = {"epoch": 0, "step": 4, "train_loss": 1.5, "test_accuracy": 0.5}


def record(epoch, **more):
  """The record of an epoch of 4 steps."""
  return RECORD | {"epoch": epoch, "step": 4 * (epoch + 1)} | more


@pytest.fixture
def log(tmp_path):
  return metrics.MetricsLog(tmp_path)


def test_append_and_read(log):
  assert log.read() == []
  log.append(RECORD)
  log.append(record(1))
  assert [record["epoch"] for record in log.read()] == [0, 1]


@pytest.mark.parametrize("torn", ['{"epoch": 1, "ste', "\0\0", "\xff\n"])
def test_torn_line_is_left_out(log, tmp_path, torn):
  log.append(RECORD)
  with (tmp_path / "metrics.jsonl").open("a", encoding="latin-1") as file:
    file.write(torn)
  assert log.read() == [RECORD]
  # The next record does not run into the torn one.
  log.drop_after(4, 4, fallen_back=False)
  log.append(record(1))
  assert len(log.read()) == 2


@pytest.mark.parametrize(
  ("epochs", "step", "kept"),
  [
    (0, 0, 0),
    (0, 3, 0),  # In the first epoch.
    (0, 4, 0),  # Trained, not evaluated.
    (1, 4, 1),
    (1, 0, 0),  # The record was ahead of its checkpoint.
    (1, 3, 0),
    (2, 4, 1),
    (2, 9, 2),
    (1, 8, 1),
  ],
)
def test_drop_after(log, epochs, step, kept):
  for epoch in range(epochs):
    log.append(record(epoch))
  assert len(log.drop_after(step, 4, fallen_back=False)) == kept
  assert [record["epoch"] for record in log.read()] == list(range(kept))


def test_a_whole_last_record_needs_no_line_break(log, tmp_path):
  """An editor may have taken it away."""
  path = tmp_path / "metrics.jsonl"
  for epoch in range(2):
    log.append(record(epoch))
  whole = path.read_bytes()
  path.write_bytes(whole[:-1])
  assert log.read() == [record(0), record(1)]
  log.drop_after(8, 4, fallen_back=False)
  assert path.read_bytes() == whole


@pytest.mark.parametrize(
  ("epochs", "message"),
  [
    ([0, 2], "line 2: epoch=2 and step=12, not 1 and 8"),
    ([0, 0], "line 2: epoch=0 and step=4, not 1 and 8"),
    ([1, 0], "line 1: epoch=1 and step=8, not 0 and 8"),
  ],
)
def test_records_must_follow_one_another(log, epochs, message):
  for epoch in epochs:
    log.append(record(epoch))
  with pytest.raises(errors.WorkdirError, match=message):
    log.read()
  with pytest.raises(errors.WorkdirError, match=r"line \d: epoch="):
    log.drop_after(8, 4, fallen_back=False)


def test_steps_must_be_those_of_the_run(log):
  for epoch in range(2):
    log.append(record(epoch, step=5 * (epoch + 1)))
  assert len(log.read()) == 2
  with pytest.raises(errors.WorkdirError, match="step=5, not 0 and 4"):
    log.drop_after(8, 4, fallen_back=False)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("[]", "not a JSON object"),
    ("null", "not a JSON object"),
    ("{", "not a JSON object"),
    ("{}", "epoch=None"),
    ('{"epoch": 0, "step": true}', "step=True"),
    ('{"epoch": 0, "step": 0}', "step=0"),
    ('{"epoch": 0, "step": 4, "val_accuracy": "1"}', "val_accuracy='1'"),
    ('{"epoch": 0, "step": 4, "test_loss": NaN}', "test_loss=nan"),
    ('{"epoch": 0, "step": 4, "test_loss": 1%s}' % ("0" * 400), "test_loss=1"),
    ('{"epoch": 0, "step": 4, "seeds": {}}', "seeds must be a list"),
    ('{"epoch": 0, "step": 4, "seeds": [1]}', "each of seeds must be"),
  ],
)
def test_a_line_that_is_no_record_is_named(log, tmp_path, line, message):
  path = tmp_path / "metrics.jsonl"
  path.write_text(f"{line}\n{json.dumps(record(1))}\n")
  with pytest.raises(errors.WorkdirError, match=message) as caught:
    log.read()
  assert f"{path}, line 1: " in str(caught.value)


@pytest.mark.parametrize(
  ("epochs", "step"),
  [
    (0, 5),
    (0, 8),
    (1, 9),  # A gap.
    (4, 0),  # As when the checkpoints were not copied along.
    (3, 7),
  ],
)
def test_drop_after_refuses_gaps_and_losses(log, epochs, step):
  for epoch in range(epochs):
    log.append(record(epoch))
  with pytest.raises(errors.WorkdirError, match=f"has {epochs} epochs but"):
    log.drop_after(step, 4, fallen_back=False)
  assert len(log.read()) == epochs


def test_drop_after_as_far_as_the_checkpoints_went(log):
  for epoch in range(4):
    log.append(record(epoch))
  assert len(log.drop_after(4, 4, fallen_back=True)) == 1


@pytest.mark.parametrize("kind", damage.KINDS)
def test_what_is_no_such_file_is_one_line(log, tmp_path, kind):
  damage.replace(tmp_path / "metrics.jsonl", kind)
  with pytest.raises(errors.WorkdirError, match=r"metrics\.jsonl"):
    log.read()


def test_drop_after_makes_no_file(log, tmp_path):
  assert log.drop_after(0, 4, fallen_back=False) == []
  assert list(tmp_path.iterdir()) == []


def test_records_do_not_go_where_a_link_leads(log, tmp_path):
  (tmp_path / "precious").touch()
  (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "precious")
  with pytest.raises(OSError, match="symbolic links"):
    log.append(RECORD)
  assert (tmp_path / "precious").read_bytes() == b""


def test_not_a_number_is_never_written(log):
  with pytest.raises(ValueError, match="train_loss is nan"):
    log.append({**RECORD, "train_loss": float("nan")})
  assert log.read() == []


@pytest.mark.parametrize(
  ("monitor", "best"), [("accuracy", 1), ("loss", 0), ("objective", 0)]
)
def test_best_record(monitor, best):
  key = f"test_{monitor}"
  records = [{"epoch": k, key: value} for k, value in enumerate([1, 3, 3, 1])]
  # Of two equally good ones the first.
  assert metrics.best_record(records, monitor)["epoch"] == best
  for record, value in zip(records, [2, 1, 3, 1], strict=True):
    record[f"val_{monitor}"] = value
  expected = 2 if monitor == "accuracy" else 1
  assert metrics.best_record(records, monitor)["epoch"] == expected


def test_records_that_must_have_scores(tmp_path):
  config = base.get_config()
  config.eval_every_epochs = 2
  kept = {"train_loss": 1, "train_accuracy": 0, "epoch_seconds": 1}
  kept |= {"images_per_second": 1}
  scores = {"test_accuracy": 0, "test_loss": 1, "test_objective": 1}
  log = metrics.MetricsLog(tmp_path, config)
  log.append({"epoch": 0, "step": 4} | kept)
  log.append({"epoch": 1, "step": 8} | kept | scores)
  assert len(log.read()) == 2
  log.append({"epoch": 2, "step": 12} | kept)
  log.append({"epoch": 3, "step": 16} | kept)
  with pytest.raises(errors.WorkdirError, match="line 4: test_accuracy=None"):
    log.read()


@pytest.mark.parametrize("monitor", ["loss", "objective"])
def test_the_best_epoch_is_that_of_any_eval_batch_size(monitor):
  """A loss as calls of 500, 360 and 7 images compute it."""
  for loss in (1.9940672790, 1.9940672424, 1.9940672477):
    records = [{"step": 1, f"test_{monitor}": 1.9940672450}]
    records += [{"step": 2, f"test_{monitor}": loss}]
    assert metrics.best_record(records, monitor)["step"] == 1
    records += [{"step": 3, f"test_{monitor}": 1.99405}]
    assert metrics.best_record(records, monitor)["step"] == 3


def all_events(folder):
  """Every event in the event files of a folder."""
  for path in sorted(pathlib.Path(folder).iterdir()):
    raw, position = path.read_bytes(), 0
    while position < len(raw):
      # TFRecord: length, its checksum, data, its checksum.
      length = int(np.frombuffer(raw, np.uint64, 1, position)[0])
      yield event_pb2.Event.FromString(raw[position + 12 :][:length])
      position += 16 + length


def events(folder):
  """(step, tag, value) of every scalar in the event files of a folder."""
  return [
    (event.step, value.tag, value.simple_value)
    for event in all_events(folder)
    for value in event.summary.value
  ]


def test_tensorboard(tmp_path):
  with metrics.TensorBoard(tmp_path, 0) as board:
    board.write(RECORD)
  assert sorted(events(tmp_path / "tensorboard")) == [
    (4, "run/epoch", 0.0),
    (4, "test/accuracy", 0.5),
    (4, "train/loss", 1.5),
  ]


def test_tensorboard_has_each_seed_beside_the_means(tmp_path):
  record = {
    "step": 4,
    "test_accuracy": 0.5,
    "test_accuracy_std": 0.25,
    "test_ensemble_accuracy": 0.75,
    "seeds": [
      {"seed": 3, "test_accuracy": 0.25},
      {"seed": 4, "test_accuracy": 0.75},
    ],
  }
  with metrics.TensorBoard(tmp_path, 0) as board:
    board.write(record)
  assert sorted(events(tmp_path / "tensorboard")) == [
    (4, "seed_3/test/accuracy", 0.25),
    (4, "seed_4/test/accuracy", 0.75),
    (4, "test/accuracy", 0.5),
    (4, "test/accuracy_std", 0.25),
    (4, "test/ensemble_accuracy", 0.75),
  ]


def test_tensorboard_hides_what_a_killed_run_wrote(tmp_path):
  """TensorBoard drops events from a session's first step on."""
  with metrics.TensorBoard(tmp_path, 8):
    pass
  starts = [
    event.step
    for event in all_events(tmp_path / "tensorboard")
    if event.session_log.status == event_pb2.SessionLog.START
  ]
  assert starts == [8]


def write_often(board):
  for _ in range(100):
    board.write(RECORD)


def test_tensorboard_on_a_disk_that_is_full_for_a_while(small_disk):
  """The error is raised where it happens, and later writes do not hang."""
  board = metrics.TensorBoard(small_disk.folder, 0)
  small_disk.fill()
  with pytest.raises(OSError, match="No space"):
    write_often(board)
  small_disk.free()
  write_often(board)
  board.__exit__(None, None, None)


def test_several_seeds_have_means_and_deviations():
  """Of any metric, whatever its name."""
  first = {"epoch": 0, "step": 4}
  own = [
    {"learning_rate": 0.25, "train_loss": 1.0, "train_top5": 0.5},
    {"learning_rate": 0.25, "train_loss": 3.0, "train_top5": 0.5},
  ]
  assert metrics.summarize([3], own[:1], {}) == own[0]
  ensemble = {"test_ensemble_loss": 1.5}
  record = first | metrics.summarize([3, 4], own, ensemble)
  seeds = [{"seed": 3} | own[0], {"seed": 4} | own[1]]
  assert record == {
    **first,
    "learning_rate": 0.25,
    "train_loss": 2.0,
    "train_loss_std": pytest.approx(2**0.5),
    "train_top5": 0.5,
    "train_top5_std": 0.0,
    "test_ensemble_loss": 1.5,
    "seeds": seeds,
  }
  timed = {"epoch_seconds": 2.0, "images_per_second": 16.0}
  assert metrics.of_seeds(record | timed) == [
    first | timed | one for one in seeds
  ]


def test_records_are_lines_of_json(log, tmp_path):
  log.append(RECORD)
  (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert json.loads(line) == RECORD


def test_a_log_of_many_seeds_and_epochs_is_read(log, monkeypatch):
  """A thousand seeds write half a megabyte an epoch."""
  sizes = []

  def read_bytes(path, limit):
    sizes.append(limit)
    return path.read_bytes()

  log.append({"epoch": 0, "step": 10})
  monkeypatch.setattr(metrics.files_lib, "read_bytes", read_bytes)
  assert log.read() == [{"epoch": 0, "step": 10}]
  assert sizes[0] > 1000 * 1000 * 1000  # Seeds, epochs, bytes.


def test_two_starts_in_one_second_have_events_of_their_own(tmp_path):
  for step in (1, 2):
    with metrics.TensorBoard(tmp_path, step):
      pass
  assert len(list((tmp_path / "tensorboard").iterdir())) == 2
