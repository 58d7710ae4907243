import io
import logging
import sys
import types

import pytest

from configs import base
from resnet_flax.run import metrics, progress

RECORD = {
  "train_loss": 1.25,
  "train_accuracy": 0.5,
  "test_loss": 1.5,
  "test_accuracy": 0.25,
  "images_per_second": 123.4,
  "evaluation_seconds": 10.0,
}


def step_metrics(step, images=8):
  """Metrics of a run's 0-based step; each step had so many images."""
  count = (step + 1) * images
  sums = {"loss": 2.0 * count, "accuracy": count / 4, "count": count}
  return [types.SimpleNamespace(step=step, sums=sums)]


def make_progress(num_epochs, steps_per_epoch, interval_seconds):
  config = base.get_config()
  config.num_epochs, config.batch_size = num_epochs, 8
  config.log.interval_seconds = float(interval_seconds)
  return progress.Progress(config, steps_per_epoch)


class Clock:
  """A clock that tests move."""

  def __init__(self, monkeypatch):
    self.now = 1000.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
  return Clock(monkeypatch)


def test_plain_lines_without_a_terminal(clock, caplog):
  caplog.set_level(logging.INFO)
  shown = make_progress(2, 4, interval_seconds=30)
  shown.start_epoch(0, 0)
  for step in range(4):
    clock.now += 20
    shown.step(step_metrics(step))
  shown.end_epoch(RECORD)
  lines = [record.message for record in caplog.records]
  # After 40 s, the first time that 30 s have gone by, and after 80 s.
  assert lines[0] == (
    "epoch 0 of 2 step 2/4: loss 2.0000, accuracy 0.2500, 0 images/s, 0:02:00"
    " left"
  )
  assert lines[1].startswith("epoch 0 of 2 step 4/4")
  assert lines[2] == (
    "epoch 0 of 2: loss 1.2500, accuracy 0.5000; test loss 1.5000, accuracy"
    " 0.2500; 123 images/s; 0:01:30 left"
  )
  assert len(lines) == 3


def test_last_line_has_no_time_left(clock, caplog):
  caplog.set_level(logging.INFO)
  shown = make_progress(1, 1, interval_seconds=30)
  shown.start_epoch(0, 0)
  clock.now += 1
  shown.step(step_metrics(0))
  shown.end_epoch({**RECORD, "val_loss": 1.0, "val_accuracy": 0.75})
  assert "left" not in caplog.text
  assert "val loss 1.0000, accuracy 0.7500; test loss" in caplog.text


def test_calls_of_several_steps(clock, caplog):
  caplog.set_level(logging.INFO)
  shown = make_progress(2, 10, interval_seconds=0)
  shown.start_epoch(1, 0)
  for step in (13, 17):
    clock.now += 4
    shown.step(step_metrics(step))
  assert [text.partition(":")[0] for text in caplog.messages] == [
    "epoch 1 of 2 step 4/10",
    "epoch 1 of 2 step 8/10",
  ]
  assert "8 images/s, 0:00:02 left" in caplog.messages[1]


def test_time_left_has_the_scorings_that_are_left(clock):
  """Of 7 epochs those after 1, 3, 5 and 6 (0-based) are scored."""
  shown = make_progress(7, 1, interval_seconds=60)
  shown._config.eval_every_epochs = 2
  found = []
  for epoch in range(7):
    shown.start_epoch(epoch, 0)
    shown.step(step_metrics(epoch))  # Without time.
    unscored = {k: v for k, v in RECORD.items() if k != "test_loss"}
    is_scored = epoch in (1, 3, 5, 6)
    shown.end_epoch(RECORD if is_scored else unscored)
    found.append(shown._left())
  seconds = (0, 30, 30, 20, 20, 10, 0)
  assert found == [f"0:00:{s}" if s else "" for s in seconds]


def test_several_seeds_have_a_mean_and_a_deviation(clock, caplog):
  caplog.set_level(logging.INFO)
  shown = make_progress(1, 2, interval_seconds=0)
  shown.start_epoch(0, 0)
  clock.now += 1
  one, other = (step_metrics(0)[0] for _ in range(2))
  other.sums["loss"] *= 2
  shown.step([one, other])
  assert caplog.messages == [
    "epoch 0 of 1 step 1/2: loss 3.0000 ± 1.4142, accuracy 0.2500 ± 0.0000, 16"
    " images/s, 0:00:01 left"
  ]
  clock.now += 1
  shown.step([step_metrics(1)[0]] * 2)
  own = {key: RECORD[key] for key in RECORD if key != "images_per_second"}
  of_seeds = [own, own | {"test_accuracy": 0.75}]
  ensemble = {"test_ensemble_accuracy": 0.875}
  record = metrics.summarize([0, 1], of_seeds, ensemble)
  timed = {"images_per_second": 123.4, "evaluation_seconds": 10.0}
  shown.end_epoch(record | timed)
  assert caplog.messages[-1] == (
    "epoch 0 of 1: loss 1.2500 ± 0.0000, accuracy 0.5000 ± 0.0000; test loss"
    " 1.5000 ± 0.0000, accuracy 0.5000 ± 0.3536, ensemble 0.8750; 123 images/s"
  )


def test_going_on_within_an_epoch(clock, caplog):
  caplog.set_level(logging.INFO)
  shown = make_progress(1, 100, interval_seconds=0)
  shown.start_epoch(0, 98)
  clock.now += 1
  shown.step(step_metrics(98))
  # The speed is that of the steps taken here.
  assert caplog.messages == [
    "epoch 0 of 1 step 99/100: loss 2.0000, accuracy 0.2500, 8 images/s,"
    " 0:00:01 left"
  ]


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_bar_on_a_terminal(clock, monkeypatch, caplog):
  caplog.set_level(logging.INFO)
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  shown = make_progress(2, 4, interval_seconds=0)
  shown.start_epoch(0, 0)
  for step in range(4):
    clock.now += 1
    shown.step(step_metrics(step))
  shown._bar.refresh()
  shown.close()
  text = terminal.getvalue()
  assert "epoch 0 of 2 100%|" in text
  for field in ("loss 2.0000", "accuracy 0.2500", "8 images/s", "0:00:04 left"):
    assert field in text
  assert caplog.records == []


def test_log_to_stderr(capsys):
  logger = logging.getLogger("resnet_flax")
  saved = logger.handlers, logger.level, logger.propagate
  try:
    progress.log_to_stderr()
    logging.getLogger("resnet_flax.train").info("compiling")
    assert capsys.readouterr().err == "compiling\n"
  finally:
    logger.handlers, logger.level, logger.propagate = saved


def test_scores_say_what_they_are_of():
  scores = {"loss": 1.5, "accuracy": 0.25, "step": 8, "epoch": 3}
  assert progress.evaluation("best", "ema", "train", scores).splitlines() == [
    "Checkpoint: best, ema weights, step 8, epoch 3 (0-based)",
    "Train loss: 1.5000",
    "Train accuracy: 0.2500",
  ]


def test_next_steps_can_be_pasted():
  config = base.get_config()
  workdir = "runs/a b,model.depth=8"
  lines = progress.next_steps(config, workdir).splitlines()
  assert len(lines) == 4
  assert lines[0] == "Run: runs/a b,model.depth=8"
  assert lines[1].endswith("--workdir='runs/a b,model.depth=8'")
  assert "report 'runs/a b,model.depth=8' --out" in lines[2]
  assert lines[3].endswith("load_model('runs/a b,model.depth=8')")
  config.ema.decay = 0.9
  assert "--weights=ema" in progress.next_steps(config, workdir)
  config.ema.decay, config.swa.start_epoch = 0.0, 1
  assert "--weights=swa --checkpoint=latest" in progress.next_steps(
    config, workdir
  )
