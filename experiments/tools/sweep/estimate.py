"""Estimates the cost of a sweep before it runs."""

import datetime
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Iterable, Sequence

import jax
from ml_collections import ConfigDict

from experiments.tools import timing
from experiments.tools.sweep import overview
from experiments.tools.sweep.definition import Cell
from resnet_flax import data
from resnet_flax.models import registry
from resnet_flax.parallel import averaging
from resnet_flax.run import errors, folder as workdir_lib, metrics
from resnet_flax.tools import summary

_COLUMNS = (
  *("epochs", "parameters", "FLOPs/image", "images", "TFLOP", "time", "cell"),
)
# Training has a forward pass and backward passes for inputs and for weights.
_TRAINING = 3
# If no speed is known, these steps measure it.
_WARM_UP_STEPS, _TIMED_STEPS = 2, 8


def table(
  cells: Sequence[Cell], measured: Sequence[pathlib.Path], gpus: int = 1
) -> str:
  """Makes a table of the cells with their remaining cost.

  A time divides the remaining FLOPs by a speed: the median FLOP/s of the cells
  that have an epoch and of the runs whose workdirs are in `measured`. Without
  any, the smallest cell runs a few training steps now, on `gpus` devices. The
  times leave out starting, compiling and preparing data.

  A row has a cell's finished epochs, trainable parameters, forward FLOPs of an
  image and training images of all epochs; for the remaining epochs, TFLOP
  (training and evaluation) and the estimated time. The sums come last. Raises
  `WorkdirError` if a workdir holds another run.
  """
  rates = _rates(cells, measured)
  rate = statistics.median(rates) if rates else rate_now(cells, gpus)
  rows: list[Sequence[str]] = [_COLUMNS]
  total = 0.0
  for cell in cells:
    overview.is_finished(cell)  # Checks that it is the same run.
    config = cell.config
    done = len(metrics.MetricsLog(cell.workdir).read())
    left = (config.num_epochs - done) * _flops_of_epoch(config)
    total += left
    size = _size(config)
    rows.append(
      (
        f"{done}/{config.num_epochs}",
        f"{size.trainable:,}",
        f"{2 * size.multiply_adds:,}",
        f"{config.num_epochs * _images_of_epoch(config):,}",
        f"{left / 1e12:.1f}",
        _time(left, rate),
        cell.name,
      )
    )
  if rates:
    basis = f"the median of {len(rates)} measured"
    basis += f" {'run' if len(rates) == 1 else 'runs'}"
  else:
    basis = (
      "measured here in some steps of the smallest cell"
      " (--measured=WORKDIR uses a run's speed)"
    )
  return (
    f"{overview.align(rows)}\n{len(cells)} cells, {total / 1e12:.1f} TFLOP"
    f" left, {_time(total, rate)} one after the other: an estimate, at"
    f" {rate / 1e9:.1f} GFLOP/s, {basis}, without starting and compiling."
  )


def _rates(
  cells: Sequence[Cell], measured: Iterable[pathlib.Path]
) -> list[float]:
  """Training FLOP/s of every run with a finished epoch."""
  runs = [(cell.workdir, cell.config) for cell in cells]
  for workdir in measured:
    runs.append((workdir, workdir_lib.load_config(workdir)))
    if not metrics.MetricsLog(workdir).read():
      raise errors.WorkdirError(
        f"--measured={workdir}: the run must have at least one finished epoch."
      )
  return [
    statistics.median(record["images_per_second"] for record in records)
    * _TRAINING
    * 2
    * _size(config).multiply_adds
    for workdir, config in runs
    if (records := metrics.MetricsLog(workdir).read())
  ]


def rate_now(cells: Sequence[Cell], gpus: int) -> float:
  """Measures FLOP/s in training steps of the smallest cell, on noise.

  It calls single steps, which is slower than training on accelerators.
  """
  config = min(
    (cell.config for cell in cells), key=lambda each: _size(each).multiply_adds
  )
  trainer = timing.prepare(config, timing.noise(config), jax.devices()[:gpus])
  for steps in (_WARM_UP_STEPS, _TIMED_STEPS):
    started = time.perf_counter()
    trainer.repeat(steps)
    seconds = time.perf_counter() - started
  images = _TIMED_STEPS * config.batch_size * config.num_seeds
  return images / seconds * _TRAINING * 2 * _size(config).multiply_adds


def _images_of_epoch(config: ConfigDict) -> int:
  """Counts the training images of an epoch over all seeds."""
  steps = data.num_train_examples(config.dataset) // config.batch_size
  return config.num_seeds * steps * config.batch_size


def _flops_of_epoch(config: ConfigDict) -> float:
  """Counts an epoch's FLOPs over all seeds, with its share of evaluation."""
  info = data.info(config.dataset)
  scored = info.num_test + config.dataset.validation_examples
  scored *= config.num_seeds * config.dataset.test_crops
  # Averaged weights are scored, too.
  scored *= len(averaging.available(config, config.num_epochs))
  passes = _TRAINING * _images_of_epoch(config)
  passes += scored / config.eval_every_epochs
  return 2.0 * _size(config).multiply_adds * passes


def _size(config: ConfigDict) -> summary.Size:
  info = data.info(config.dataset)
  return _size_of(config.model.to_json(), info.num_classes, info.image_shape)


@functools.cache
def _size_of(
  model: str, num_classes: int, image_shape: tuple[int, int, int]
) -> summary.Size:
  """Caches sizes: cells often differ only in seeds, and tracing is slow."""
  config = ConfigDict(json.loads(model))
  return summary.measure_size(
    registry.create_model(config, config.num_classes or num_classes),
    image_shape,
  )


def _time(flops: float, rate: float) -> str:
  return str(datetime.timedelta(seconds=round(flops / rate)))
