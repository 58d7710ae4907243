"""Compares two experiments over seeds, over test images and in their keys."""

import os
from collections.abc import Iterable, Sequence

import numpy as np

from resnet_flax.data import types
from resnet_flax.parallel import averaging
from resnet_flax.run import errors, folder, keys, load, mirror
from resnet_flax.tools.report import intervals, runs as runs_lib
from resnet_flax.tools.report.runs import Group, Statistic
from resnet_flax.tools.report.tables import Cell, Column, Table

Paths = Iterable[str | os.PathLike[str]]

_TITLES = ("of", "A", "B", "n", "A - B", "from", "to", "p", "note")
_Row = list[Cell]  # The cells below `_TITLES`.


def compare(
  a: Paths, b: Paths, metric: str, which: str, *, images: bool
) -> list[Table]:
  """Returns tables: warnings if there are any, comparisons, and differences.

  `a` and `b` are workdirs of one experiment's seeds, or folders that contain
  them. `metric` is a key of metrics.jsonl; its 'test_' may be left out. `which`
  is the 'best' or the 'last' epoch of each seed. `images=True`
  also scores checkpoints on the test images.
  """
  sides = _side("A", a), _side("B", b)
  key = _key(metric, sides)
  data = [side.config["data"] for side in sides]
  same_data = data[0] == data[1] != "unknown"
  epochs = [f"{s.num_epochs} of {s.config['num_epochs']}" for s in sides]
  cautions = []
  if not same_data:
    differ = "may differ" if "unknown" in data else "differ"
    cautions.append(f"the data {differ}: A has {data[0]}, B has {data[1]}")
  if epochs[0] != epochs[1] or not all(side.finished for side in sides):
    cautions.append(f"unequal or missing epochs: A {epochs[0]}, B {epochs[1]}")
  for name, side in zip("AB", sides, strict=True):
    counted = {run.seed for run in side.counted}
    if left_out := sorted({run.seed for run in side.runs} - counted):
      seeds = ", ".join(map(str, left_out))
      cautions.append(f"unfinished seeds of {name} are left out: {seeds}")
  unscored = [r for s in sides for r in s.counted if r.chosen_by is None]
  if which == "best" and unscored:
    raise errors.ConfigError(
      f"--which=best: {unscored[0].folder} has no scored epoch yet. Pass"
      " --which=last."
    )
  rows = _over_seeds(sides, key, which)
  if images and same_data:
    rows += _over_images(sides, key, which)
  chosen = sorted({str(side.counted[0].chosen_by) for side in sides})
  best = f"best epochs by {' or '.join(chosen)}"
  facts = [_facts(side) for side in sides]
  differing = runs_lib.differing_keys(facts)
  digits = 2 if runs_lib.is_share(key) else 4
  tables = [
    Table("warnings", "Warnings", Column("warning", cautions)),
    Table(
      "comparison",
      f"A - B, 95 % intervals, {best if which == 'best' else 'last epochs'}",
      *(
        Column(title, cells, *((4, 0.0) if title == "p" else (digits,)))
        for title, *cells in zip(_TITLES, *rows, strict=True)
      ),
    ),
    Table(
      "differences",
      "What differs",
      Column("key", differing),
      Column("A", [facts[0].get(key) for key in differing]),
      Column("B", [facts[1].get(key) for key in differing]),
    ),
  ]
  return [table for table in tables if table.columns[0].cells]


def _side(name: str, paths: Paths) -> Group:
  runs = runs_lib.read(runs_lib.find([mirror.local(p, name) for p in paths]))
  groups = runs_lib.group(runs)
  if len(groups) > 1:
    differing = runs_lib.differing_keys([group.config for group in groups])
    raise errors.ConfigError(
      f"{name} has runs of several experiments: they differ in"
      f" {', '.join(differing)}. Pass the seeds of one experiment."
    )
  if not groups[0].num_epochs:
    raise errors.WorkdirError(
      f"{runs[0].folder} has no finished epoch. Train it before you compare it."
    )
  return groups[0]


def _key(metric: str, sides: Sequence[Group]) -> str:
  """The full key of a metric, which all networks must have recorded."""
  # One epoch with a key is enough: averages start late, scoring skips epochs.
  recorded = [
    set().union(*run.records[: side.num_epochs])
    for side in sides
    for run in side.counted
  ]
  known = set.intersection(*recorded)
  known = {k for k in known if k.startswith(("train_", "val_", "test_"))}
  key = metric if metric in known else f"test_{metric}"
  if key not in known:
    raise errors.unknown_name("in all networks, --metric", metric, known)
  return key


def _facts(side: Group) -> dict[str, str]:
  """How a side was trained; semicolons separate the values of several runs."""
  facts: dict[str, dict[str, None]] = {}  # The inner keys are an ordered set.
  for run in side.counted:
    environment = keys.flatten(folder.read_environment(run.folder))
    run_facts = environment | {**side.config, "runs": run.folder}
    for key, value in run_facts.items():
      facts.setdefault(key, {})[runs_lib.shown(value)] = None
  return {key: "; ".join(values) for key, values in facts.items()}


def _over_seeds(sides: Sequence[Group], key: str, which: str) -> list[_Row]:
  factor, title = (100, f"{key} (%)") if runs_lib.is_share(key) else (1, key)
  a, b = (np.array(side.at(which, key, factor)) for side in sides)
  if np.isnan(np.concatenate([a, b])).any():
    other = "best" if which == "last" else "last"
    raise errors.ConfigError(
      f"--metric={key} must be recorded in the {which} epoch of every seed."
      f" Pass --which={other}, or another metric."
    )
  rows = [_row(f"{title}, all seeds (Welch's t)", a, b, paired=False)]
  a_seeds, b_seeds = ([run.seed for run in side.counted] for side in sides)
  _, *indices = np.intersect1d(a_seeds, b_seeds, return_indices=True)
  if len(indices[0]) > 1:
    pairs = a[indices[0]], b[indices[1]]
    rows.append(_row(f"{title}, same seeds (paired t)", *pairs, paired=True))
  if factor == 100:
    count = intervals.seeds_needed(a, b, 0.2)
    note = f"{count} seeds per side give 80 % power at the 5 % level, if"
    note += " these seeds show the true spread"
    no_spread = "cannot tell: neither side has a spread"
    rows.append(_note("seeds for 0.2 points", note if count else no_spread))
  return rows


def _over_images(sides: Sequence[Group], key: str, which: str) -> list[_Row]:
  what = "test images"
  if not all(side.finished for side in sides):
    note = "left out: checkpoints of unfinished runs may be of other epochs"
    return [_note(what, note)]
  weights = next((w for w in averaging.WEIGHTS if f"_{w}_" in key), "raw")
  checkpoint = "latest" if which == "last" else which
  opened: dict[str, types.Dataset] = {}
  right, counts = [], [len(side.counted) for side in sides]
  try:
    for side in sides:
      is_right = []
      for run in side.counted:
        network = run.folder, run.seed, checkpoint, weights
        scored = load.predict_test(*network, opened=opened)
        is_right.append(scored.probabilities.argmax(1) == scored.labels)
      right.append(np.sum(is_right, axis=0))
  except errors.UserError as error:
    return [_note(what, f"left out: {error}")]
  a, b = (100 * k / n for k, n in zip(right, counts, strict=True))
  rows = [_row(f"{what}, right (%) (paired t)", a, b, paired=True)]
  if counts[0] != counts[1]:
    return [*rows, _note(f"{what} (McNemar)", "left out: unequal seed counts")]
  note = f"A is better on {np.sum(a > b)} images, B on {np.sum(a < b)}"
  return [*rows, _note(f"{what} (McNemar)", note, intervals.mcnemar(*right))]


def _row(what: str, a: np.ndarray, b: np.ndarray, *, paired: bool) -> _Row:
  t_test = intervals.interval(a, b, paired=paired)
  note = "cannot tell: a side has one seed, or no spread" if not t_test else ""
  # A paired test uses the spread of the differences, not the sides' spreads.
  means = [
    Statistic(x.mean(), None if paired or len(x) < 2 else x.std(ddof=1), len(x))
    for x in (a, b)
  ]
  n = f"{len(a)}, {len(b)}"
  return [what, *means, n, a.mean() - b.mean(), *(t_test or [None] * 3), note]


def _note(what: str, note: str, p: float | None = None) -> _Row:
  """A row with a note in place of means and an interval."""
  none = Statistic.of([])
  return [what, none, none, None, None, None, None, p, note]
