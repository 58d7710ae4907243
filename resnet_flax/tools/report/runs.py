"""Runs as their workdirs tell them, and groups that differ in the seed alone.

Reads config.json, metrics.jsonl and environment.json, nothing else.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from resnet_flax.run import (
  config as config_rules,
  errors,
  folder as workdir_lib,
  metrics,
)

# Runs that differ in these alone are repetitions of one experiment.
_REPETITION_KEYS = ("seed", "num_seeds", *config_rules.MAY_DIFFER)

# What every record of an epoch must have, besides what chooses the best one.
_RECORD_KEYS = (
  "epoch",
  "step",
  "train_loss",
  "train_accuracy",
  "test_loss",
  "test_accuracy",
  "epoch_seconds",
  "images_per_second",
)
_SEED_KEYS = (
  "seed",
  "train_loss",
  "train_accuracy",
  "test_loss",
  "test_accuracy",
)
_CONFIG_KEYS = (
  "seed",
  "num_seeds",
  "num_epochs",
  "model.name",
  "model.depth",
  "dataset.name",
  "checkpoint.monitor",
)

_LONGEST_NAME = 40


@dataclasses.dataclass(frozen=True)
class Statistic:
  """A mean over repetitions."""

  mean: float  # Of the values.
  # The sample standard deviation (ddof = 1); None of a single value.
  std: float | None
  n: int  # How many values.

  @classmethod
  def of(cls, values: Sequence[float]) -> "Statistic":
    """The statistic of at least one value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return cls(statistics.fmean(values), std, len(values))

  def scaled(self, factor: float) -> "Statistic":
    """The statistic of the values times a positive factor."""
    std = None if self.std is None else factor * self.std
    return Statistic(factor * self.mean, std, self.n)


@dataclasses.dataclass(frozen=True)
class Run:
  """One workdir."""

  folder: pathlib.Path  # Where it is.
  name: str  # Its path below what all runs of the report have in common.
  config: dict[str, Any]  # Flat, for example {'model.depth': 20, ...}.
  records: list[metrics.Record]  # One for each finished epoch, oldest first.
  device: str  # What it was trained on, for people; '' if that is not known.
  # Names the pixels it was trained on (`Dataset.source`), if known.
  data: str | None

  @property
  def finished(self) -> bool:
    """Whether all its epochs are done."""
    return len(self.records) >= self.config["num_epochs"]

  @property
  def seeds(self) -> range:
    """The seeds that it trains."""
    first = self.config["seed"]
    return range(first, first + self.config["num_seeds"])

  def of_seed(self, seed: int) -> list[metrics.Record]:
    """The records of one of its seeds, which have `_SEED_KEYS`."""
    index = seed - self.seeds[0]
    return [metrics.of_seeds(record)[index] for record in self.records]

  def best_record(self, seed: int, num_epochs: int) -> metrics.Record:
    """The record of a seed's best checkpoint among the first `num_epochs`."""
    monitor = self.config["checkpoint.monitor"]
    return metrics.best_record(self.of_seed(seed)[:num_epochs], monitor)

  @property
  def chosen_by(self) -> str | None:
    """The key that chooses the best epoch; None before the first one."""
    if not self.records:
      return None
    monitor = self.config["checkpoint.monitor"]
    return metrics.monitored(self.records[0], monitor)

  @property
  def training_seconds(self) -> float:
    """Of all epochs, without compilation and evaluation."""
    return math.fsum(record["epoch_seconds"] for record in self.records)

  @property
  def images_per_second(self) -> float:
    """Over all epochs; of several seeds all images together."""
    images = math.fsum(
      record["images_per_second"] * record["epoch_seconds"]
      for record in self.records
    )
    return images / self.training_seconds


@dataclasses.dataclass(frozen=True)
class Repetition:
  """One seed of a run: what means are taken over."""

  run: Run
  seed: int


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs whose configurations differ in nothing that an experiment is about."""

  number: int  # Counts the groups of a report from 1.
  name: str  # Short, for legends, for example '2: plain, depth=56'.
  label: str  # In full, for example 'model.name=plain, model.depth=56'.
  config: dict[str, Any]  # Flat, without the keys in which the runs may differ.
  runs: tuple[Run, ...]  # All of them.
  # What is counted, each seed once: those that are finished, or where none is,
  # those that have an epoch.
  repetitions: tuple[Repetition, ...]
  num_epochs: int  # Epochs that all repetitions have; 0 if there are none.

  @property
  def finished(self) -> bool:
    """Whether all epochs of what is counted are done."""
    return self.num_epochs >= self.config["num_epochs"]

  @property
  def counted_runs(self) -> tuple[Run, ...]:
    """The runs that the repetitions are from, each once."""
    counted = {id(repetition.run) for repetition in self.repetitions}
    return tuple(run for run in self.runs if id(run) in counted)

  def curves(self, key: str) -> np.ndarray:
    """A metric as float64[n, num_epochs] of n repetitions."""
    return np.array(
      [
        [record[key] for record in r.run.of_seed(r.seed)[: self.num_epochs]]
        for r in self.repetitions
      ],
      np.float64,
    )

  def final(self, key: str) -> Statistic | None:
    """A metric at the last epoch; None if there is no epoch."""
    if not self.num_epochs:
      return None
    return Statistic.of(self.curves(key)[:, -1].tolist())

  def best(self, key: str) -> Statistic | None:
    """A metric at each seed's best epoch; None if there is no epoch."""
    if not self.num_epochs:
      return None
    return Statistic.of(
      [
        float(r.run.best_record(r.seed, self.num_epochs)[key])
        for r in self.repetitions
      ]
    )


def find(paths: Iterable[str | os.PathLike[str]]) -> list[pathlib.Path]:
  """The workdirs at and below some folders.

  Args:
    paths: workdirs (folders with a config.json), or folders with workdirs
      anywhere below.

  Returns:
    Each workdir once: in the order of the arguments, and by name below each.

  Raises:
    WorkdirError: a folder does not exist or holds no run.
  """
  found: dict[str, pathlib.Path] = {}
  for path in map(pathlib.Path, paths):
    if not path.is_dir():
      raise errors.WorkdirError(
        f"{path} is no folder. Pass the workdirs of runs, or a folder that they"
        " lie in, for example runs."
      )
    below = _find_below(path)
    if not below:
      raise errors.WorkdirError(
        f"no run lies in {path}: neither it nor a folder below it has a"
        " config.json. Pass the workdirs of runs, or a folder that they lie in,"
        " for example runs."
      )
    for folder in below:
      found.setdefault(os.path.realpath(folder), folder)
  return list(found.values())


def _find_below(path: pathlib.Path) -> list[pathlib.Path]:
  def fail(error: OSError) -> None:
    raise errors.WorkdirError(
      f"{error.filename} cannot be read: {error.strerror}. Make it readable, or"
      " pass the workdirs one by one."
    ) from error

  found = []
  for folder, below, files in os.walk(path, onerror=fail):
    if "config.json" in files:
      found.append(pathlib.Path(folder))
      below.clear()
    # Hidden are those that are being made; see `convert`.
    below[:] = sorted(name for name in below if not name.startswith("."))
  return found


def read(folders: Sequence[pathlib.Path]) -> list[Run]:
  """Reads runs.

  Raises:
    WorkdirError: a file of theirs is damaged; it is named.
  """
  real = [os.path.realpath(folder) for folder in folders]
  common = os.path.commonpath([os.path.dirname(folder) for folder in real])
  return [
    _read(folder, os.path.relpath(path, common))
    for folder, path in zip(folders, real, strict=True)
  ]


def _read(folder: pathlib.Path, name: str) -> Run:
  stored = workdir_lib.load_config(folder)
  config = config_rules.flatten(stored.to_dict())
  _check_config(folder / "config.json", config)
  environment = _read_environment(folder / "environment.json")
  run = Run(
    folder=folder,
    name=shown(name),
    config=config,
    records=metrics.MetricsLog(folder).read(),
    device=_device(environment),
    data=environment.get("data"),
  )
  _check_records(folder / "metrics.jsonl", run)
  return run


def _check_config(path: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Checks the keys that a report reads; a run of another version has them."""
  try:
    for key in _CONFIG_KEYS:
      config_rules.KEYS[key].check(config[key])
  except errors.ConfigError as error:
    raise errors.WorkdirError(
      f"{path} is not the configuration of a run: {error} Restore it, or leave"
      " its folder out."
    ) from error


def _read_environment(path: pathlib.Path) -> dict[str, Any]:
  try:
    environment = json.loads(path.read_text())
    if not isinstance(environment, dict):
      raise ValueError("it holds no JSON object")
    return environment
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    raise errors.WorkdirError(
      f"{path} cannot be read: {errors.one_line(error)}. Restore or delete it:"
      " without it the report does not say what the run was trained on."
    ) from error


def _device(environment: Mapping[str, Any]) -> str:
  devices = environment.get("devices")
  if not isinstance(devices, list) or not devices:
    return ""
  kind = str(devices[0])
  if kind == "cpu":
    threads = environment.get("cpu_threads", "?")
    return f"{environment.get('cpu_model', 'CPU')}, {threads} threads"
  return f"{len(devices)} x {kind}"


def _check_records(path: pathlib.Path, run: Run) -> None:
  def damaged(line: int, what: str) -> errors.WorkdirError:
    return errors.WorkdirError(
      f"{path}, line {line}: {what}. Restore it, or leave its folder out."
    )

  num_lines = len(path.read_bytes().splitlines()) if path.exists() else 0
  # What is read ends before the first line that is no JSON: only the last one
  # can have been cut off when a run was killed.
  if num_lines > len(run.records) + 1:
    raise damaged(len(run.records) + 1, "it is no JSON object")
  for line, record in enumerate(run.records, start=1):
    if not isinstance(record, dict):
      raise damaged(line, "it is no JSON object")
    if line == 1:
      keys = {*_RECORD_KEYS, str(run.chosen_by)}
    _check_numbers(record, keys, functools.partial(damaged, line))
    if record["epoch"] != line - 1:
      raise damaged(line, f"epoch={record['epoch']}, not {line - 1}")
    if record["epoch_seconds"] <= 0:
      raise damaged(line, f"epoch_seconds={record['epoch_seconds']}")
    if len(run.seeds) > 1:
      of_seeds = record.get("seeds")
      if not isinstance(of_seeds, list) or len(of_seeds) != len(run.seeds):
        raise damaged(line, f"seeds has not the {len(run.seeds)} of num_seeds")
      for seed, of_seed in zip(run.seeds, of_seeds, strict=True):
        if not isinstance(of_seed, dict):
          raise damaged(line, "seeds holds what is no JSON object")
        _check_numbers(of_seed, _SEED_KEYS, functools.partial(damaged, line))
        if of_seed["seed"] != seed:
          raise damaged(line, f"seed={of_seed['seed']}, not {seed}")


def _check_numbers(
  record: Mapping[str, Any],
  keys: Iterable[str],
  damaged: Callable[[str], errors.WorkdirError],
) -> None:
  for key in sorted(keys):
    value = record.get(key)
    if type(value) not in (int, float) or not math.isfinite(record[key]):
      raise damaged(f"{key}={value!r} is no finite number")


def group(runs: Iterable[Run]) -> list[Group]:
  """Puts runs together that differ in seeds and free keys alone.

  Returns:
    The groups, in the order of the values of the keys in which they differ.
  """
  by_key: dict[str, list[Run]] = {}
  for run in runs:
    key = json.dumps(_compared(run.config), sort_keys=True)
    by_key.setdefault(key, []).append(run)
  members = list(by_key.values())
  configs = [_compared(runs[0].config) for runs in members]
  keys = differing_keys(configs)

  def order(position: int) -> list[tuple[bool, float, str]]:
    values = [configs[position].get(key) for key in keys]
    # Numbers by their size, before what is compared as text.
    return [
      (False, float(value), "")
      if isinstance(value, int | float)
      else (True, 0.0, str(value))
      for value in values
    ]

  positions = sorted(range(len(members)), key=order)
  names = labels([configs[position] for position in positions])
  return [
    _group(number, names[number - 1], configs[position], members[position])
    for number, position in enumerate(positions, start=1)
  ]


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in config.items() if k not in _REPETITION_KEYS}


def _group(
  number: int,
  names: tuple[str, str],
  config: dict[str, Any],
  members: Sequence[Run],
) -> Group:
  by_seed: dict[int, Run] = {}
  for run in members:
    for seed in run.seeds:
      # The same seed twice is not two repetitions: the longer one counts.
      known = by_seed.get(seed)
      if known is None or len(run.records) > len(known.records):
        by_seed[seed] = run
  begun = {seed: run for seed, run in by_seed.items() if run.records}
  counted = {seed: run for seed, run in begun.items() if run.finished} or begun
  return Group(
    number=number,
    name=f"{number}: {names[0]}",
    label=names[1],
    config=config,
    runs=tuple(members),
    repetitions=tuple(
      Repetition(run, seed) for seed, run in sorted(counted.items())
    ),
    num_epochs=min((len(run.records) for run in counted.values()), default=0),
  )


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
  """The keys whose values are not the same in all flat configurations.

  The network and its depth come first.
  """
  keys = {key for config in configs for key in config}
  return [
    key
    for key in sorted(
      keys, key=lambda key: (key != "model.name", key != "model.depth", key)
    )
    if len({json.dumps(config.get(key)) for config in configs}) > 1
  ]


def labels(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
  """What tells flat configurations apart: each short, and in full."""
  keys = differing_keys(configs)
  if not keys:
    first = configs[0]
    keys = [key for key in ("model.name", "model.depth") if key in first]
  short = _short_keys(keys)
  return [
    (
      _cut(
        [
          str(config.get(key))
          if key == "model.name"
          else f"{short[key]}={shown(config.get(key))}"
          for key in keys
        ]
      ),
      ", ".join(f"{key}={shown(config.get(key))}" for key in keys),
    )
    for config in configs
  ]


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
  """Each key's last part, where that is not another's as well."""
  short = {key: key.removesuffix(".name").rpartition(".")[2] for key in keys}
  values = list(short.values())
  return {
    key: value if values.count(value) == 1 else key
    for key, value in short.items()
  }


def shown(value: Any) -> str:
  """A configuration's value, or a path, as printable text."""
  if isinstance(value, list | tuple):
    return f"[{' '.join(map(shown, value))}]"
  if isinstance(value, bool) or value == "":
    return json.dumps(value)
  # A path may have line breaks and bytes that are no text.
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def _cut(parts: Sequence[str]) -> str:
  """As many parts as a legend has room for."""
  name = parts[0]
  for part in parts[1:]:
    if len(name) + len(part) + 2 > _LONGEST_NAME:
      return f"{name[:_LONGEST_NAME]}, …"
    name += f", {part}"
  return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"
