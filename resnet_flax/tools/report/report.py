"""What is in a report, and its files: made as a whole, then written."""

import contextlib
import itertools
import logging
import operator
import os
import pathlib
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from resnet_flax.run import errors, files as files_lib, load, metrics, mirror
from resnet_flax.tools.report import (
  figures as figures_lib,
  intervals,
  page,
  runs as runs_lib,
  scores as scores_lib,
)
from resnet_flax.tools.report.page import Section
from resnet_flax.tools.report.runs import Group, Run, Statistic, shown
from resnet_flax.tools.report.tables import Column, Table

_logger = logging.getLogger(__name__)

# Which checkpoints are scored: that of the best group of each data set, of
# each group, or none.
SCORED = ("best", "each", "none")

_MOST_CONFUSED = 10
_NO_CURVES = "No run has finished an epoch yet."
_NO_DEPTHS = "This needs finished groups that differ in model.depth alone."


class Summary(NamedTuple):
  """What a report was made of."""

  num_runs: int  # Workdirs.
  num_groups: int  # Groups of runs that differ in their seeds alone.
  page: pathlib.Path  # The file to open.


def make(
  paths: Iterable[str | os.PathLike[str]],
  out: str | os.PathLike[str],
  scored: str = "best",
) -> Summary:
  """Writes a report of runs.

  Args:
    paths: workdirs, or folders that they lie in.
    out: the report's folder; of what it holds, only files of the same names
      are replaced.
    scored: one of `SCORED`. Where a checkpoint or the data cannot be had, the
      page says why, and a warning is logged.

  Raises:
    ConfigError: `scored` is none of them.
    WorkdirError: there is no run, a file of one is damaged, or `out` cannot be
      written.
  """
  if scored not in SCORED:
    raise errors.unknown_name("checkpoints", scored, SCORED)
  out = errors.local_path(out, "--out")
  folders = [mirror.local(path, "folder") for path in paths]
  runs = runs_lib.read(runs_lib.find(folders))
  groups = runs_lib.group(runs)
  with _explain_write_errors(out):
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
      pass
  by_data = runs_lib.by_data(groups)
  curves = [
    figure
    for end, of_data in by_data
    for metric in figures_lib.metric_names(of_data)
    for figure in figures_lib.learning_curves(of_data, metric, end)
  ]
  depths = [f for end, each in by_data if (f := figures_lib.depth(each, end))]
  sections = [
    _accuracies(groups),
    Section("Learning curves", [] if curves else [_NO_CURVES], curves),
    Section("Error against depth", [] if depths else [_NO_DEPTHS], depths),
    _times(groups),
    _configurations(groups),
    _runs(groups),
    *map(_checkpoint, _scored(groups, scored)),
  ]
  files: dict[str, bytes] = {}
  for section in sections:
    for figure in section.figures:
      files[f"figures/{figure.name}.png"] = figure.png
      files[f"figures/{figure.name}.svg"] = figure.svg
    for table in section.tables:
      files[f"tables/{table.name}.md"] = table.to_markdown().encode()
      files[f"tables/{table.name}.csv"] = table.to_csv().encode()
  # Last: what it shows is there when it is.
  files["index.html"] = page.render(len(runs), len(groups), sections).encode()
  with _explain_write_errors(out):
    for name, content in files.items():
      path = out / name
      path.parent.mkdir(exist_ok=True)
      files_lib.write_file(path, content)
  return Summary(len(runs), len(groups), out / "index.html")


@contextlib.contextmanager
def _explain_write_errors(out: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise errors.WorkdirError(
      f"--out={out} cannot be written:"
      f" {error.strerror or errors.one_line(error)}. Pass another folder."
    ) from error


# ---- Sections about groups

_GROUP = (
  Column("#", lambda group: group.number),
  Column("data set", lambda group: group.data),
  Column("group", lambda group: group.name),
)


def _accuracies(groups: Sequence[Group]) -> Section:
  notes = [
    "Accuracies and errors are of the test split; “best” is the epoch that"
    " checkpoint.monitor chooses. ± is the sample standard deviation over n"
    " seeds. Groups are named by as many keys as tell those of a data set"
    " apart; “Configurations” has all that differ."
  ]
  on_test = [
    group.number
    for group in groups
    if any((run.chosen_by or "").startswith("test_") for run in group.runs)
  ]
  if on_test:
    which = "all groups" if len(on_test) == len(groups) else _numbers(on_test)
    notes.append(
      f"In {which} the best epoch was chosen on the test split, as there is no"
      " validation split: the best accuracy is optimistic, the final one is"
      " not."
    )
  unfinished = [group.number for group in groups if not group.finished]
  if unfinished:
    notes.append(
      f"Unfinished: {_numbers(unfinished)}. Their values are those of the last"
      " epoch that all their seeds have."
    )
  left_out = sum(
    group.finished and not run.finished and bool(run.records)
    for group in groups
    for run in group.runs
  )
  if left_out:
    notes.append(
      f"Unfinished runs of finished groups are not counted: {left_out}."
    )

  def column(title, digits, function, *arguments):
    return Column(
      title, lambda group: function(group, *arguments), digits, statistic=True
    )

  table = Table(
    "accuracy",
    "Final and best accuracy of each group.",
    groups,
    *_GROUP,
    Column("n", lambda g: len(g.repetitions)),
    Column("epochs", lambda g: _epochs(g.num_epochs, g.config)),
    column("final test accuracy (%)", 2, Group.final, "test_accuracy", 100),
    column("best test accuracy (%)", 2, Group.best, "test_accuracy", 100),
    column("final test top-5 accuracy (%)", 2, Group.final, "test_top5", 100),
    column("final train accuracy (%)", 2, Group.final, "train_accuracy", 100),
    column("final test loss (nats)", 4, Group.final, "test_loss"),
  )
  tables = [table]
  rows = [*filter(None, (_difference(group, groups) for group in groups))]
  if rows:
    compared = Table(
      "intervals",
      "Final test accuracy less that of the first group on the same data, in"
      " points, with 95 % intervals over seeds (Welch's t).",
      rows,
      *(
        Column(title, operator.itemgetter(k), 2 if k > 1 else 0)
        for k, title in enumerate(("group", "first", "points", "from", "to"))
      ),
    )
    notes.append("Other comparisons: python -m resnet_flax.compare A --with B.")
    tables.append(compared)
  return Section("Accuracy", notes=notes, tables=tables)


def _difference(
  group: Group, groups: Sequence[Group]
) -> tuple[int, int, float, float, float] | None:
  """A row that compares a group with the first of its data; None if it is it.

  Or if there are too few seeds, or none that differ.
  """
  first = next(g for g in groups if g.config["data"] == group.config["data"])
  if first is group or not (first.num_epochs and group.num_epochs):
    return None
  a, b = (100 * g.curves("test_accuracy")[:, -1] for g in (group, first))
  found = intervals.interval(a, b, paired=False)
  return found and (group.number, first.number, a.mean() - b.mean(), *found[:2])


def _times(groups: Sequence[Group]) -> Section:
  def over_runs(title, digits, value):
    def cell(group: Group) -> Statistic | None:
      values = [value(run) for run in group.counted_runs]
      return None if None in values else Statistic.of(values)

    return Column(title, cell, digits, statistic=True)

  def devices(group: Group) -> str:
    names = (run.device or "unknown" for run in group.counted_runs)
    return "; ".join(dict.fromkeys(names))

  table = Table(
    "time",
    "Time and speed of each group.",
    groups,
    *_GROUP,
    Column("n", lambda group: len(group.counted_runs)),
    over_runs("seconds per epoch", 1, lambda r: r.seconds / len(r.records)),
    over_runs("of them for data", 1, lambda r: r.mean_seconds("data_seconds")),
    over_runs(
      "evaluation (s)", 1, lambda r: r.mean_seconds("evaluation_seconds")
    ),
    over_runs("images/s", 0, lambda r: r.images_per_second),
    over_runs("training time (min)", 1, lambda r: r.seconds / 60),
    Column("trained on", devices),
  )
  note = (
    "The training part of the epochs, without compilation and evaluation, and"
    " what of it the loop waited for batches; n counts runs. Where a run trains"
    " several seeds, images/s are those of all seeds together."
  )
  return Section("Time", notes=[note], tables=[table])


def _configurations(groups: Sequence[Group]) -> Section:
  configs = [group.config for group in groups]
  differing = runs_lib.differing_keys(configs)

  def of_group(group):
    config = group.config
    return Column(
      f"group {group.number}",
      lambda key: shown(config[key]) if key in config else None,
    )

  differences = Table(
    "differences",
    "The keys in which the groups differ.",
    differing,
    Column("key", str),
    *map(of_group, groups),
  )
  same = Table(
    "same",
    "The keys that have one value in all groups.",
    sorted(configs[0].keys() - set(differing)),
    Column("key", str),
    Column("value", lambda key: shown(configs[0][key])),
    folded=True,
  )
  note = (
    "Seeds, and keys that do not change what is computed, do not part groups;"
    " data, the copy that was trained on, does."
  )
  tables = [differences, same] if differing else [same]
  return Section("Configurations", notes=[note], tables=tables)


def _runs(groups: Sequence[Group]) -> Section:
  every = [(group, run) for group in groups for run in group.runs]
  ensemble = "test_ensemble_accuracy"

  def column(title, cell, digits=0):
    """Of a run that has an epoch."""
    return Column(title, lambda x: cell(x[1]) if x[1].records else None, digits)

  def best(run: Run, key: str) -> list[float]:
    count = len(run.records)
    return [run.best_record(seed, count)[key] for seed in run.seeds]

  def final(run: Run, key: str) -> float | None:
    last = run.records[-1]
    return 100 * last[key] if key in last else None

  def counted(item: tuple[Group, Run]) -> str | None:
    group, run = item
    return _ranges([r.seed for r in group.repetitions if r.run is run]) or None

  columns = [
    Column("#", lambda x: x[0].number),
    Column("run", lambda x: x[1].name),
    Column("seeds", lambda x: _ranges(x[1].seeds)),
    Column("epochs", lambda x: _epochs(len(x[1].records), x[1].config)),
    Column("counted seeds", counted),
    column("final test accuracy (%)", lambda r: final(r, "test_accuracy"), 2),
    column(
      "best test accuracy (%)",
      lambda r: 100 * statistics.fmean(best(r, "test_accuracy")),
      2,
    ),
    column(
      "best epoch (0-based)",
      lambda r: ", ".join(str(k) for k in sorted({*best(r, "epoch")})),
    ),
    column("chosen by", lambda r: r.chosen_by),
    column("images/s", lambda r: r.images_per_second),
    column("training time (min)", lambda r: r.seconds / 60, 1),
  ]
  if any(ensemble in record for _, run in every for record in run.records):
    title = "ensemble's final test accuracy (%)"
    columns.append(column(title, lambda r: final(r, ensemble), 2))
  note = (
    "Of a run with several seeds the values are means over them. A seed that"
    " occurs twice in a group is counted once, in the run with more epochs."
  )
  table = Table("runs", "Each run.", every, *columns)
  return Section("Runs", notes=[note], tables=[table])


def _epochs(done: int, config: runs_lib.Config) -> str:
  planned = config["num_epochs"]
  return f"{done} of {planned}" + ("" if done >= planned else ", unfinished")


def _numbers(numbers: Sequence[int]) -> str:
  return f"group{'s' if numbers[1:] else ''} {_ranges(numbers)}"


def _ranges(numbers: Iterable[int]) -> str:
  """Ascending numbers, for example '0–3, 7'."""
  parts = []
  # Neighbours have the same distance from their places.
  for _, run in itertools.groupby(enumerate(numbers), lambda x: x[1] - x[0]):
    part = [number for _, number in run]
    parts.append(str(part[0]) + (f"–{part[-1]}" if part[1:] else ""))
  return ", ".join(parts)


# ---- Sections about checkpoints


def _scored(groups: Sequence[Group], scored: str) -> list[Group]:
  """The groups whose best checkpoint is scored."""
  if scored == "none":
    return []
  begun = [group for group in groups if group.num_epochs]
  if scored == "each":
    return begun

  def mean_of_best(group: Group) -> float:
    best = group.best("test_accuracy")
    assert best is not None
    return best.mean

  # Accuracies on other images cannot be compared.
  return [max(each, key=mean_of_best) for _, each in runs_lib.by_data(begun)]


def _checkpoint(group: Group) -> Section:
  # The run and the seed that are the best by `checkpoint.monitor`.
  records = [
    r.run.best_record(r.seed, len(r.run.records)) for r in group.repetitions
  ]
  best = metrics.best_record(records, group.config["checkpoint.monitor"])
  run, seed = group.repetitions[records.index(best)]
  title = f"Best checkpoint of group {group.number}: {group.data}, {group.name}"
  try:
    scores = score(run, seed)
  except errors.UserError as error:
    _logger.warning(
      "warning: the report lacks the checkpoint of group %d: %s",
      group.number,
      error,
    )
    return Section(title, notes=[f"This could not be made: {error}"])
  what = f"the best checkpoint of {run.name}"
  name = f"group{group.number}"
  notes = [
    f"Run {run.name}, seed {seed}, after {scores.step:,} steps:"
    f" {scores.num_correct:,} of {scores.num_images:,} test images are right"
    f" ({scores.num_correct / scores.num_images:.2%})."
  ]
  figures = [figures_lib.confusion(scores, f"confusion_{name}", what)]
  if len(scores.mistakes):
    figures.append(figures_lib.mistakes(scores, f"mistakes_{name}", what))
  else:
    notes.append("No test image is classified wrongly.")
  tables = _score_tables(scores, name, what)
  return Section(title, notes=notes, figures=figures, tables=tables)


def _score_tables(
  scores: scores_lib.Scores, name: str, what: str
) -> list[Table]:
  names, matrix, wrong = scores.class_names, scores.confusion, scores.mistakes
  classes = range(len(names))

  def column(j: int) -> Column:
    return Column(names[j], lambda k: int(matrix[k, j]))

  def accuracy(k: int) -> float | None:
    images = int(matrix[k].sum())
    return 100 * int(matrix[k, k]) / images if images else None

  return [
    Table(
      f"classes_{name}",
      f"Accuracy of each class, of {what}.",
      classes,
      Column("class", names.__getitem__),
      Column("test images", lambda k: int(matrix[k].sum())),
      Column("accuracy (%)", accuracy, 2),
    ),
    Table(
      f"confused_{name}",
      "What is taken for what most often.",
      scores.confused(_MOST_CONFUSED),
      Column("true class", lambda pair: names[pair[0]]),
      Column("predicted class", lambda pair: names[pair[1]]),
      Column("test images", lambda pair: pair[2]),
    ),
    Table(
      f"confusion_{name}",
      "The confusion matrix: rows are true classes, columns predicted ones.",
      classes,
      Column("true class", names.__getitem__),
      *map(column, classes),
      folded=True,
    ),
    Table(
      f"mistakes_{name}",
      "The most confident mistakes.",
      range(len(wrong)),
      Column("test image, from 0", lambda k: int(wrong.positions[k])),
      Column("true class", lambda k: names[wrong.labels[k]]),
      Column("predicted class", lambda k: names[wrong.predicted[k]]),
      Column("probability (%)", lambda k: 100 * float(wrong.confidences[k]), 2),
    ),
  ]


def score(run: Run, seed: int) -> scores_lib.Scores:
  """Scores a seed's best checkpoint on the test split of its data set.

  Raises as `load.predict_test`.
  """
  found = load.predict_test(run.folder, seed)
  return scores_lib.summarize(
    found.dataset.test,
    found.labels,
    found.probabilities,
    class_names=found.dataset.class_names,
    step=found.step,
  )
