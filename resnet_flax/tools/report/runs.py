"""Reads runs from workdirs, and groups the runs that repeat one experiment.

Only config.json, metrics.jsonl and environment.json are read.
"""

import dataclasses
import functools
import itertools
import json
import math
import operator
import os
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from resnet_flax.run import config as config_lib, errors, keys, metrics
from resnet_flax.run.folder import load_config, read_environment

# Runs that differ only in these keys are repetitions of one experiment.
_REPETITION_KEYS = ("seed", "num_seeds", *config_lib.MAY_DIFFER)

Config = Mapping[str, Any]  # Flat, for example {'model.depth': 20, ...}.


class Statistic(NamedTuple):
  """A mean over repetitions."""

  mean: float  # NaN if there are no values.
  # Sample standard deviation (ddof = 1); None if n < 2 or if the mean is NaN.
  std: float | None
  n: int  # The number of values.

  @classmethod
  def of(cls, values: Sequence[float]) -> Self:
    """The statistic of any number of values, zero included."""
    mean = statistics.fmean(values) if values else math.nan
    has_std = len(values) > 1 and not math.isnan(mean)
    std = statistics.stdev(values) if has_std else None
    return cls(mean, std, len(values))


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """One network: a seed of a workdir."""

  seed: int
  folder: pathlib.Path  # The workdir.
  name: str  # The workdir's path below the folder that holds all workdirs.
  config: Config  # Its 'data' is `Dataset.source`, or 'unknown'.
  records: list[metrics.Record]  # One for each finished epoch, oldest first.
  device: str  # Its devices, described for people, or 'unknown'.
  ensemble: float  # Last test accuracy of the workdir's ensemble, or NaN.

  @property
  def finished(self) -> bool:
    """Whether all its epochs are done."""
    return len(self.records) >= self.config["num_epochs"]

  def record(self, which: str, num_epochs: int | None = None) -> metrics.Record:
    """The 'best' or 'last' of the first `num_epochs` records, or of all."""
    records = self.records[:num_epochs]
    if which == "last":
      return records[-1]
    return metrics.best_record(records, self.config["checkpoint.monitor"])

  @property
  def chosen_by(self) -> str | None:
    """The key that chooses the best epoch; None if no epoch was scored yet."""
    best = self.record("best")
    key = metrics.monitored(best, self.config["checkpoint.monitor"])
    return key if key in best else None

  @property
  def seconds(self) -> float:
    """Training time of all epochs, without compilation and evaluation."""
    return math.fsum(record["epoch_seconds"] for record in self.records)

  def mean(self, key: str, scored: bool = False) -> float:
    """Mean of a key over all or the `scored` epochs; NaN if one lacks it."""
    used = [r for r in self.records if "test_loss" in r or not scored]
    return statistics.fmean([r.get(key, math.nan) for r in used] or [math.nan])

  @property
  def images_per_second(self) -> float:
    """Mean speed over all epochs, counting the images of all the seeds."""
    speeds = [record["images_per_second"] for record in self.records]
    seconds = [record["epoch_seconds"] for record in self.records]
    return statistics.fmean(speeds, seconds)


@dataclasses.dataclass(frozen=True)
class Group:
  """The runs of one experiment; they differ only in `_REPETITION_KEYS`."""

  number: int  # Counts the groups of a report from 1.
  data: str  # The data set, for example 'cifar10'.
  name: str  # Unique within its data set: 'plain, depth=56'.
  config: Config  # Without the keys in which the runs may differ.
  runs: Sequence[Run]  # All runs, also those that are not counted.

  @functools.cached_property
  def counted(self) -> list[Run]:
    """Each seed's longest run: only finished ones, or begun ones if none is."""
    by_seed: dict[int, Run] = {}
    # The first one of equally long runs.
    for run in sorted(self.runs, key=lambda run: -len(run.records)):
      by_seed.setdefault(run.seed, run)
    begun = [run for _, run in sorted(by_seed.items()) if run.records]
    return [run for run in begun if run.finished] or begun

  @functools.cached_property
  def num_epochs(self) -> int:
    """Epochs that all counted runs have; 0 if there are none."""
    return min((len(run.records) for run in self.counted), default=0)

  @property
  def finished(self) -> bool:
    """Whether all counted runs have done all their epochs."""
    return self.num_epochs >= self.config["num_epochs"]

  def curves(self, key: str) -> np.ndarray:
    """A metric over epochs, float64[seeds, num_epochs]; NaN if missing."""
    by_run = [run.records[: self.num_epochs] for run in self.counted]
    return np.array([[r.get(key, math.nan) for r in each] for each in by_run])

  def at(self, which: str, key: str, factor: float = 1) -> list[float]:
    """A metric times a factor at each seed's 'best' or 'last' epoch, or NaN."""
    return [
      factor * run.record(which, self.num_epochs).get(key, math.nan)
      for run in self.counted
    ]

  def statistic(self, which: str, key: str, factor: float = 1) -> Statistic:
    """The statistic of the values that `at` returns."""
    return Statistic.of(self.at(which, key, factor))


def is_share(key: str) -> bool:
  """Whether a metric, such as 'test_top5', is shown in percent."""
  return key.endswith(("accuracy", "top5"))


def find(paths: Iterable[str | os.PathLike[str]]) -> list[pathlib.Path]:
  """Each workdir at or below `paths` once, by order of paths, then by name."""
  advice = "Pass workdirs, or a folder that contains some, such as runs."

  def fail(error: OSError) -> None:
    raise errors.WorkdirError(
      f"{error.filename} cannot be read: {error.strerror}. {advice}"
    ) from error

  workdirs: dict[str, pathlib.Path] = {}  # By their real paths.
  for path in paths:
    in_path = []
    for folder, below, files in os.walk(path, onerror=fail):
      # A hidden folder is an unfinished workdir; see `new_folder`.
      below[:] = sorted(name for name in below if not name.startswith("."))
      if "config.json" in files:
        in_path.append(pathlib.Path(folder))
        below.clear()
    if not in_path:
      raise errors.WorkdirError(
        f"{path} contains no run: no config.json is in it or below it. {advice}"
      )
    for workdir in in_path:
      workdirs.setdefault(os.path.realpath(workdir), workdir)
  return list(workdirs.values())


def read(folders: Sequence[pathlib.Path]) -> list[Run]:
  """Reads a run per seed of each workdir; `WorkdirError` if one is damaged."""
  real_paths = [os.path.realpath(each) for each in folders]
  common = os.path.commonpath([os.path.dirname(path) for path in real_paths])
  runs = []
  for folder, path in zip(folders, real_paths, strict=True):
    stored, environment = load_config(folder), read_environment(folder)
    # Runs of other data or other first weights are different experiments.
    config = keys.flatten(stored.to_dict())
    config["data"] = environment.get("data") or "unknown"
    origin = environment.get("converted", {})
    if "sha256" in origin:
      config["converted"] = f"{origin.get('source')} ({origin['sha256'][:8]})"
    records = metrics.MetricsLog(folder, stored).read()
    shared = {
      "folder": folder,
      "name": shown(os.path.relpath(path, common)),
      "config": config,
      "device": _device(environment),
      "ensemble": [{}, *records][-1].get("test_ensemble_accuracy", math.nan),
    }
    for k in range(stored.num_seeds):
      seed_records = [metrics.of_seeds(record)[k] for record in records]
      runs.append(Run(stored.seed + k, records=seed_records, **shared))
  return runs


def _device(environment: Mapping[str, Any]) -> str:
  devices = environment.get("devices")
  if not devices:
    return "unknown"
  if (kind := str(devices[0])) != "cpu":
    return f"{len(devices)} x {kind}"
  threads = environment.get("cpu_threads", "?")
  return f"{environment.get('cpu_model', 'CPU')}, {threads} threads"


# ---- Groups


def group(runs: Iterable[Run]) -> list[Group]:
  """Groups the runs that differ only in `_REPETITION_KEYS`.

  Groups are ordered by the values of the keys in which they differ; groups of
  one data set follow each other.
  """
  by_config: dict[str, list[Run]] = {}
  for run in runs:
    config = {k: v for k, v in run.config.items() if k not in _REPETITION_KEYS}
    by_config.setdefault(json.dumps(config, sort_keys=True), []).append(run)
  members = [(json.loads(key), same) for key, same in by_config.items()]
  differing = differing_keys([config for config, _ in members])

  def order(member: tuple[Config, list[Run]]) -> list[tuple[bool, Any]]:
    # Numbers are ordered by size and come first; the rest is ordered as text.
    return [
      (False, value) if isinstance(value, int | float) else (True, str(value))
      for value in map(member[0].get, differing)
    ]

  members.sort(key=order)
  sets = {(config["dataset.name"], config["data"]) for config, _ in members}
  names = [name for name, _ in sets]

  def data_set(member: tuple[Config, list[Run]]) -> str:
    name, data = member[0]["dataset.name"], member[0]["data"]
    return f"{name} ({data})" if names.count(name) > 1 else name

  groups: list[Group] = []
  for data, of_data in itertools.groupby(members, data_set):
    configs, runs_of = zip(*of_data, strict=True)
    for each in zip(labels(configs), configs, runs_of, strict=True):
      groups.append(Group(len(groups) + 1, data, *each))
  return groups


def by_data(groups: Iterable[Group]) -> list[tuple[str, list[Group]]]:
  """Each data set's suffix of names ('' if it is alone) and its groups."""
  of_data = itertools.groupby(groups, operator.attrgetter("data"))
  parts = [(f"_{data}", [*each]) for data, each in of_data]
  return parts if parts[1:] else [("", each) for _, each in parts]


def differing_keys(configs: Sequence[Config]) -> list[str]:
  """The keys whose values differ: data set, network and depth, then others."""
  first = ("dataset.name", "data", "model.name", "model.depth")
  others = sorted({key for config in configs for key in config} - {*first})
  return [
    key
    for key in (*first, *others)
    if len({json.dumps(config.get(key)) for config in configs}) > 1
  ]


def labels(configs: Sequence[Config]) -> list[str]:
  """Names that tell configurations apart; redundant keys are left out."""
  chosen: list[str] = []
  num_distinct = 1
  for key in differing_keys(configs):
    values = {json.dumps([*map(each.get, [*chosen, key])]) for each in configs}
    if len(values) > num_distinct:
      chosen.append(key)
      num_distinct = len(values)
  default = ("model.name", "model.depth")
  chosen = chosen or [key for key in default if key in configs[0]]
  # A key is named by its last part, unless two of the keys share that part.
  last_parts = [key.removesuffix(".name").rpartition(".")[2] for key in chosen]
  names = [
    f"{part if last_parts.count(part) == 1 else key}=".removeprefix("model=")
    for key, part in zip(chosen, last_parts, strict=True)
  ]
  pairs = [*zip(names, chosen, strict=True)]
  return [
    ", ".join(name + shown(each.get(key)) for name, key in pairs)
    for each in configs
  ]


def shown(value: Any) -> str:
  """A configuration's value, or a path, as printable text."""
  if isinstance(value, list | tuple):
    return f"[{' '.join(map(shown, value))}]"
  if isinstance(value, bool) or value == "":
    return json.dumps(value)
  # A path may have line breaks and bytes that are not text.
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))
