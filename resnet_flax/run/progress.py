"""What a person sees of a run: a bar on a terminal, lines elsewhere."""

import datetime
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import tqdm

from resnet_flax import step as step_lib
from resnet_flax.run import metrics

_logger = logging.getLogger(__name__)


class Progress:
  """Follows the epochs of a run.

  Args:
    num_epochs: of the whole run.
    steps_per_epoch: of one epoch.
    batch_size: images of a step.
    interval_seconds: without a terminal, the time between lines.
    bar: whether there may be one.
  """

  def __init__(
    self,
    num_epochs: int,
    steps_per_epoch: int,
    batch_size: int,
    interval_seconds: float,
    *,
    bar: bool = True,
  ):
    self._num_epochs = num_epochs
    self._steps_per_epoch = steps_per_epoch
    self._batch_size = batch_size
    self._interval = interval_seconds
    # None: no bar where standard error is not a terminal.
    self._without_bar = None if bar else True
    self._bar: Any = None
    self._epoch = 0
    self._step = self._first_step = 0
    self._evaluation_seconds = 0.0
    self._seconds_per_step = 0.0
    self._started = self._last_line = 0.0

  def start_epoch(self, epoch: int, step: int) -> None:
    """Begins the training of a 0-based epoch after its first `step` steps."""
    self._epoch, self._step, self._first_step = epoch, step, step
    self._started = self._last_line = time.perf_counter()
    self._bar = tqdm.tqdm(
      total=self._steps_per_epoch,
      initial=step,
      desc=self._title(),
      bar_format="{desc} {percentage:3.0f}%|{bar:20}|{postfix}",
      dynamic_ncols=True,
      leave=False,
      disable=self._without_bar,
    )

  def step(self, of_seeds: Sequence[step_lib.StepMetrics]) -> None:
    """Takes in the metrics of a step of each seed, on the host."""
    taken = int(of_seeds[0].step) + 1 - self._epoch * self._steps_per_epoch
    new_steps, self._step = taken - self._step, taken
    now = time.perf_counter()
    steps = self._step - self._first_step
    self._seconds_per_step = (now - self._started) / steps
    if self._bar.disable:
      if now - self._last_line >= self._interval:
        self._last_line = now
        _logger.info(
          "%s step %d/%d: %s",
          self._title(),
          self._step,
          self._steps_per_epoch,
          self._text(of_seeds),
        )
    else:
      self._bar.set_postfix_str(self._text(of_seeds), refresh=False)
      self._bar.update(new_steps)

  def end_epoch(self, record: metrics.Record, evaluation: float) -> None:
    """Ends an epoch with its record and the seconds its evaluation took."""
    self._evaluation_seconds = evaluation
    of_seeds = metrics.of_seeds(record)

    def mean(key: str) -> str:
      return _mean([values[key] for values in of_seeds])

    text = f"{self._title()}: loss {mean('train_loss')}, accuracy"
    text += f" {mean('train_accuracy')}"
    for split in ("val", "test"):
      if f"{split}_loss" in record:
        text += f"; {split} loss {mean(f'{split}_loss')}, accuracy"
        text += f" {mean(f'{split}_accuracy')}"
      ensemble = f"{split}_ensemble_accuracy"
      if ensemble in record:
        text += f", ensemble {record[ensemble]:.4f}"
    text += f"; {record['images_per_second']:.0f} images/s"
    if self._left():
      text += f"; {self._left()} left"
    _logger.info("%s", text)

  def close(self) -> None:
    """Removes the bar, if there is one."""
    if self._bar is not None:
      self._bar.close()

  def _title(self) -> str:
    return f"epoch {self._epoch + 1}/{self._num_epochs}"

  def _text(self, of_seeds: Sequence[step_lib.StepMetrics]) -> str:
    sums = [each.sums for each in of_seeds]
    losses = [float(each["loss"] / each["count"]) for each in sums]
    accuracies = [float(each["accuracy"] / each["count"]) for each in sums]
    images = len(sums) * self._batch_size
    text = f"loss {_mean(losses)}, accuracy {_mean(accuracies)},"
    text += f" {images / self._seconds_per_step:.0f} images/s"
    return f"{text}, {self._left()} left" if self._left() else text

  def _left(self) -> str:
    """Time left for the whole run, evaluations included."""
    epochs = self._num_epochs - self._epoch
    steps = epochs * self._steps_per_epoch - self._step
    seconds = steps * self._seconds_per_step
    trained = self._step == self._steps_per_epoch
    seconds += (epochs - trained) * self._evaluation_seconds
    return str(datetime.timedelta(seconds=round(seconds))) if seconds else ""


def _mean(values: Sequence[float]) -> str:
  """The mean; of several with its sample standard deviation."""
  text = f"{statistics.fmean(values):.4f}"
  return f"{text} ± {statistics.stdev(values):.4f}" if values[1:] else text


def log_to_stderr() -> None:
  """Sends the package's messages, as plain lines, to standard error."""
  handler = logging.StreamHandler(sys.stderr)
  handler.setFormatter(logging.Formatter("%(message)s"))
  logger = logging.getLogger("resnet_flax")
  logger.handlers = [handler]
  logger.setLevel(logging.INFO)
  logger.propagate = False
