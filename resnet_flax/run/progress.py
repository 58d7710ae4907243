"""What a person sees of a run: a bar on a terminal, lines elsewhere."""

import datetime
import itertools
import logging
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import tqdm
from ml_collections import ConfigDict

from resnet_flax import step as step_lib
from resnet_flax.run import metrics

_logger = logging.getLogger(__name__)


class Progress:
  """A bar on a terminal, elsewhere a line every `log.interval_seconds`."""

  def __init__(self, config: ConfigDict, steps_per_epoch: int):
    self._config, self._steps_per_epoch = config, steps_per_epoch
    self._bar: Any = tqdm.tqdm(disable=True)
    self._seconds_per_step = self._evaluation_seconds = 0.0

  def start_epoch(self, epoch: int, step: int) -> None:
    """Begins a 0-based epoch, of which the first `step` steps are done."""
    self._epoch, self._step, self._first_step = epoch, step, step
    self._title = f"epoch {epoch} of {self._config.num_epochs}"
    self._started = self._last_line = time.perf_counter()
    self._bar = tqdm.tqdm(
      total=self._steps_per_epoch,
      initial=step,
      desc=self._title,
      bar_format="{desc} {percentage:3.0f}%|{bar:20}|{postfix}",
      dynamic_ncols=True,
      leave=False,
      # Only process 0 shows a bar. None: no bar without a terminal.
      disable=True if jax.process_index() else None,
    )

  def step(self, of_seeds: Sequence[step_lib.StepMetrics]) -> None:
    """Takes each seed's metrics of a step, on the host; shows their means."""
    self._step = int(of_seeds[0].step) + 1 - self._epoch * self._steps_per_epoch
    now = time.perf_counter()
    seconds = now - self._started
    self._seconds_per_step = seconds / (self._step - self._first_step)
    if not self._bar.disable:
      self._bar.set_postfix_str(self._text(of_seeds), refresh=False)
      self._bar.update(self._step - self._bar.n)
    elif now - self._last_line >= self._config.log.interval_seconds:
      self._last_line = now
      title = f"{self._title} step {self._step}/{self._steps_per_epoch}"
      _logger.info("%s: %s", title, self._text(of_seeds))

  def end_epoch(self, record: metrics.Record) -> None:
    """Logs an epoch's record."""
    if "test_loss" in record:
      self._evaluation_seconds = record["evaluation_seconds"]

    def mean(key: str) -> str:
      std = record.get(f"{key}_std")
      return f"{record[key]:.4f}" + ("" if std is None else f" ± {std:.4f}")

    parts = []
    for split in ("train", "val", "test"):
      if f"{split}_loss" in record:
        part = f"{split} loss {mean(f'{split}_loss')}, accuracy"
        part = f"{part.removeprefix('train ')} {mean(f'{split}_accuracy')}"
        for name in ("ensemble", "ema", "swa"):
          if (key := f"{split}_{name}_accuracy") in record:
            part += f", {name} {mean(key)}"
        parts.append(part)
    parts.append(f"{record['images_per_second']:.0f} images/s")
    if self._left():
      parts.append(f"{self._left()} left")
    _logger.info("%s: %s", self._title, "; ".join(parts))

  def close(self) -> None:
    """Removes the bar, if there is one."""
    self._bar.close()

  def _text(self, of_seeds: Sequence[step_lib.StepMetrics]) -> str:
    def mean(name: str) -> str:
      values = [float(s.sums[name] / s.sums["count"]) for s in of_seeds]
      std = f" ± {statistics.stdev(values):.4f}" if values[1:] else ""
      return f"{name} {statistics.fmean(values):.4f}{std}"

    speed = len(of_seeds) * self._config.batch_size / self._seconds_per_step
    left = f", {self._left()} left" if self._left() else ""
    return f"{mean('loss')}, {mean('accuracy')}, {speed:.0f} images/s{left}"

  def _left(self) -> str:
    """Time left for the whole run with its evaluations; '' if none is left."""
    epochs = self._config.num_epochs - self._epoch
    steps = epochs * self._steps_per_epoch - self._step
    seconds = steps * self._seconds_per_step
    is_trained = self._step == self._steps_per_epoch  # The current epoch.
    num_epochs, every = self._config.num_epochs, self._config.eval_every_epochs
    evaluations = -(-num_epochs // every) - (self._epoch + is_trained) // every
    evaluations = min(evaluations, epochs - is_trained)
    seconds += evaluations * self._evaluation_seconds
    return str(datetime.timedelta(seconds=round(seconds))) if seconds else ""


# ---- After a run


def results(config: ConfigDict, records: Sequence[metrics.Record]) -> str:
  """The scores of a finished run's last epoch, and each seed's best epoch."""
  lines = [f"Last epoch: {records[-1]['epoch']} (0-based)"]
  lines += _scores(records[-1], prefix="test_")
  monitor = config.checkpoint.monitor
  best_records = metrics.best_records(records, monitor)
  for seed, best in enumerate(best_records, config.seed):
    key = metrics.monitored(best, monitor)
    split = "validation" if key.startswith("val_") else "test"
    criterion = f"by {split} {monitor} {best[key]:.4f}"
    text = (
      f"Best epoch: {best['epoch']} (0-based), test accuracy"
      f" {best['test_accuracy']:.4f}, chosen"
      f" {'on the test split' if key == 'test_accuracy' else criterion}"
    )
    lines.append(f"Seed {seed}: {text}" if config.num_seeds > 1 else text)
  return "\n".join(lines)


def next_steps(config: ConfigDict, workdir: str) -> str:
  """A finished run's workdir, and commands that use its network."""
  folder = shlex.quote(workdir)
  command = f"python -m resnet_flax.main --mode=eval --workdir={folder}"
  lines = [
    f"Run: {workdir}",
    f"Score its best epoch: {command}",
    f"Report: python -m resnet_flax.report {folder} --out=report",
    f"In Python: resnet_flax.load_model({workdir!r})",
  ]
  if config.ema.decay:
    lines.insert(2, f"Score its averaged weights: {command} --weights=ema")
  if config.swa.start_epoch:
    options = "--weights=swa --checkpoint=latest"
    lines.insert(2, f"Score its averaged weights: {command} {options}")
  return "\n".join(lines)


def evaluation(
  checkpoint: str, weights: str, split: str, scores: dict[str, Any]
) -> str:
  """A checkpoint and its scores, from `load.evaluate_workdir`, as text."""
  checkpoint += f", {weights} weights" if weights != "raw" else ""
  lines = []
  for each in scores.get("seeds", [scores]):
    epoch = each.get("epoch")
    when = "before training" if epoch is None else f"epoch {epoch} (0-based)"
    text = f"Checkpoint: {checkpoint}, step {each['step']}, {when}"
    if "seed" in each:
      accuracy = f"{split} accuracy {each['accuracy']:.4f}"
      text = f"Seed {each['seed']}: {text}, {accuracy}"
    lines.append(text)
  return "\n".join([*lines, *_scores(scores, split)])


def _scores(
  scores: dict[str, Any], split: str = "test", prefix: str = ""
) -> list[str]:
  """Lines of loss and accuracies; several seeds also have std and ensemble."""
  lines = []
  titles = {"loss": "loss", "accuracy": "accuracy", "top5": "top-5 accuracy"}
  for weights, metric in itertools.product(("", "ema_", "swa_"), titles):
    key = f"{prefix}{weights}{metric}"
    if key not in scores:  # No average, few classes, or an older record.
      continue
    title = f"{weights}{titles[metric]}".replace("_", " ")
    text = f"{split.capitalize()} {title}: {scores[key]:.4f}"
    if f"{key}_std" in scores:
      text += f" ± {scores[f'{key}_std']:.4f}, ensemble"
      text += f" {scores[f'{prefix}{weights}ensemble_{metric}']:.4f}"
    lines.append(text)
  return lines


def log_to_stderr() -> None:
  """Sends the package's messages, as plain lines, to standard error."""
  handler = logging.StreamHandler(sys.stderr)
  handler.setFormatter(logging.Formatter("%(message)s"))
  logger = logging.getLogger("resnet_flax")
  logger.handlers = [handler]
  logger.setLevel(logging.INFO)
  logger.propagate = False
