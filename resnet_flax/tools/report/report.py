"""Makes all sections and files of a report, then writes the files."""

import base64
import logging
import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jinja2
import numpy as np

from resnet_flax.data import types
from resnet_flax.run import errors, files as files_lib, load, metrics, mirror
from resnet_flax.tools import new_folder
from resnet_flax.tools.report import (
  figures as figures_lib,
  intervals,
  runs as runs_lib,
  scores as scores_lib,
)
from resnet_flax.tools.report.runs import Group, shown
from resnet_flax.tools.report.tables import Column, Table

_logger = logging.getLogger(__name__)

_MOST_CONFUSED = 10
_NO_CURVES = "No run has finished an epoch yet."
_NO_DEPTHS = "This needs finished groups that differ only in model.depth."


class Section(NamedTuple):
  """A part of the page under one heading."""

  title: str  # The heading.
  notes: Sequence[str] = ()  # Paragraphs of plain text.
  figures: Sequence[figures_lib.Rendered] = ()  # Shown below the notes.
  tables: Sequence[Table] = ()  # Shown last.


class Summary(NamedTuple):
  """What a report was made of."""

  num_runs: int  # Workdirs.
  num_groups: int  # Experiments; see `runs.Group`.
  page: pathlib.Path  # The file to open.


def make(
  paths: Iterable[str | os.PathLike[str]],
  out: str | os.PathLike[str],
  scored: str = "best",
) -> Summary:
  """Writes a report of runs into the folder `out`, and keeps its other files.

  `paths` are workdirs, or folders that contain workdirs. `scored` names the
  groups whose best checkpoint is scored: the 'best' one of every data set,
  'each' or 'none'. If a checkpoint or its data is missing, the page says why,
  and a warning is logged.
  """
  out = errors.local_path(out, "--out")
  workdirs = runs_lib.find([mirror.local(path, "folder") for path in paths])
  groups = runs_lib.group(runs_lib.read(workdirs))
  with new_folder.writing(out, "--out", "Pass another folder."):
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # Checks early that it is writable.
  by_data = runs_lib.by_data(groups)
  curves = [
    figure
    for end, of_data in by_data
    for metric in figures_lib.metric_names(of_data)
    for figure in figures_lib.learning_curves(of_data, metric, end)
  ]
  depths = [f for end, each in by_data if (f := figures_lib.depth(each, end))]
  opened: dict[str, types.Dataset] = {}  # Each data set is loaded once.
  sections = [
    _accuracies(groups),
    Section("Learning curves", [] if curves else [_NO_CURVES], curves),
    Section("Error against depth", [] if depths else [_NO_DEPTHS], depths),
    _configurations(groups),
    _runs(groups),
    *(_checkpoint(group, opened) for group in _scored(groups, scored)),
  ]
  files: dict[str, bytes] = {}
  for section in sections:
    for figure in section.figures:
      files[f"figures/{figure.name}.png"] = figure.png
      files[f"figures/{figure.name}.svg"] = figure.svg
    for table in section.tables:
      files[f"tables/{table.name}.md"] = table.to_markdown().encode()
      files[f"tables/{table.name}.csv"] = table.to_csv().encode()
  # The page is written last, after all files that it names.
  files["index.html"] = _page(len(workdirs), len(groups), sections).encode()
  with new_folder.writing(out, "--out", "Pass another folder."):
    for name, content in files.items():
      path = out / name
      path.parent.mkdir(exist_ok=True)
      files_lib.write_file(path, content)
  return Summary(len(workdirs), len(groups), out / "index.html")


def _page(num_runs: int, num_groups: int, sections: Sequence[Section]) -> str:
  """The report as one HTML page, which needs no script and no other file."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("resnet_flax.tools.report", ""),
    # Names of folders and values of configurations may hold any text.
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters["base64"] = lambda raw: base64.b64encode(raw).decode()
  template = environment.get_template("page.html.jinja")
  return template.render(
    num_runs=num_runs, num_groups=num_groups, sections=sections
  )


# ---- Sections about groups


def _accuracies(groups: Sequence[Group]) -> Section:
  notes = [
    "Accuracies are on the test split, unless a title says train. The key"
    " checkpoint.monitor chooses the “best” epoch. Without a validation split,"
    " the test split decides (“Runs” names the key): then the best accuracy is"
    " optimistic, the final accuracy is not. ± is the sample standard deviation"
    " over n seeds. All values are of the raw weights; the learning curves also"
    " show ema and swa. An unfinished group has the values of the last epoch"
    " that all its seeds have; a finished group does not count its unfinished"
    " runs.",
    "A name has only the keys that tell the groups of a data set apart;"
    " “Configurations” lists all keys that differ. Other comparisons: python -m"
    " resnet_flax.compare A --with B.",
  ]

  def column(title, which, key, factor=100, digits=2):
    cells = [group.statistic(which, key, factor) for group in groups]
    return Column(title, cells, digits)

  table = Table(
    "accuracy",
    "Final and best accuracy of each group.",
    Column("#", [group.number for group in groups]),
    Column("data set", [group.data for group in groups]),
    Column("group", [group.name for group in groups]),
    Column("n", [len(group.counted) for group in groups]),
    Column("epochs", [_epochs(g.num_epochs, g.config) for g in groups]),
    column("final test accuracy (%)", "last", "test_accuracy"),
    column("best test accuracy (%)", "best", "test_accuracy"),
    column("final test top-5 accuracy (%)", "last", "test_top5"),
    column("final train accuracy (%)", "last", "train_accuracy"),
    column("final test loss (nats)", "last", "test_loss", factor=1, digits=4),
  )
  return Section("Accuracy", notes, tables=[table, *_differences(groups)])


def _differences(groups: Sequence[Group]) -> list[Table]:
  """Finished groups minus the first of them; no table if no interval exists."""
  rows = []
  finished = [group for group in groups if group.finished]
  for _, (first, *others) in runs_lib.by_data(finished):
    b = np.array(first.at("last", "test_accuracy", 100))
    for group in others:
      a = np.array(group.at("last", "test_accuracy", 100))
      if interval := intervals.interval(a, b, paired=False):
        points = a.mean() - b.mean()
        rows.append((group.number, first.number, points, *interval[:2]))
  titles = ("group", "first", "points", "from", "to")
  table = Table(
    "intervals",
    "Final test accuracy of finished groups minus that of the first finished"
    " group on the same data, in points, with 95 % intervals over seeds"
    " (Welch's t, not corrected for several comparisons).",
    *map(Column, titles, zip(*rows, strict=True)),
  )
  return [table] if rows else []


def _configurations(groups: Sequence[Group]) -> Section:
  configs = [group.config for group in groups]
  differing = runs_lib.differing_keys(configs)
  common = sorted(configs[0].keys() - set(differing))
  same = Table(
    "same",
    "The keys that have one value in all groups.",
    Column("key", common),
    Column("value", [shown(configs[0][key]) for key in common]),
    folded=True,
  )
  differences = Table(
    "differences",
    "The keys in which the groups differ.",
    Column("key", differing),
    *(
      Column(f"group {g.number}", [shown(g.config.get(k)) for k in differing])
      for g in groups
    ),
  )
  note = (
    "Runs of a group were trained on the same copy of the data. Their seeds may"
    " differ, and keys that do not change the computation."
  )
  tables = [differences, same] if differing else [same]
  return Section("Configurations", [note], tables=tables)


def _runs(groups: Sequence[Group]) -> Section:
  pairs = [(group, run) for group in groups for run in group.runs]
  runs = [run for _, run in pairs]

  def column(title, cell, digits=0):
    """A column whose cells are empty for runs without an epoch."""
    return Column(title, [cell(r) if r.records else None for r in runs], digits)

  def accuracy(title, which):
    key = "test_accuracy"
    return column(title, lambda r: 100 * r.record(which).get(key, math.nan), 2)

  counted = ["yes" if run in group.counted else "no" for group, run in pairs]
  columns = [
    Column("#", [group.number for group, _ in pairs]),
    Column("run", [run.name for run in runs]),
    Column("seed", [str(run.seed) for run in runs]),  # A name, not a number.
    Column("epochs", [_epochs(len(r.records), r.config) for r in runs]),
    Column("counted", counted),
    accuracy("final test accuracy (%)", "last"),
    accuracy("best test accuracy (%)", "best"),
    column(
      "best epoch (0-based)",
      lambda r: str(r.record("best")["epoch"]) if r.chosen_by else None,
    ),
    column("chosen by", lambda r: r.chosen_by),
    column("images/s", lambda r: r.images_per_second),
    column("training time (min)", lambda r: r.seconds / 60, 1),
    column("seconds per epoch", lambda r: r.seconds / len(r.records), 1),
    column("waiting for data (s)", lambda r: r.mean("data_seconds"), 1),
    column("evaluation (s)", lambda r: r.mean("evaluation_seconds", True), 1),
    Column("trained on", [run.device for run in runs]),
  ]
  ensembles = [100 * run.ensemble for run in runs]
  if not all(map(math.isnan, ensembles)):
    title = "ensemble's final test accuracy (%)"
    columns.append(Column(title, ensembles))
  note = (
    "A run of several seeds has one row per seed; times, images/s and ensemble"
    " are of all its seeds together. A seed that occurs twice in a group counts"
    " once, in the run with more epochs. Times are of training, without"
    " compilation and evaluation. “evaluation (s)” includes the compilation at"
    " the first scoring after a start. “waiting for data (s)” is the part of an"
    " epoch in which the loop waited for batches."
  )
  return Section("Runs", [note], tables=[Table("runs", "Each run.", *columns)])


def _epochs(done: int, config: runs_lib.Config) -> str:
  planned = config["num_epochs"]
  return f"{done} of {planned}" + ("" if done >= planned else ", unfinished")


# ---- Sections about checkpoints


def _scored(groups: Sequence[Group], scored: str) -> list[Group]:
  """The groups whose best checkpoint is scored."""
  begun = [g for g in groups if g.num_epochs and scored != "none"]
  if scored != "best":
    return begun

  def mean_of_best(group: Group) -> float:
    mean = group.statistic("best", "test_accuracy").mean
    return -1 if math.isnan(mean) else mean  # Not scored yet.

  # Accuracies on different test images cannot be compared.
  return [max(each, key=mean_of_best) for _, each in runs_lib.by_data(begun)]


def _checkpoint(group: Group, opened: dict[str, types.Dataset]) -> Section:
  # The run that is best by `checkpoint.monitor` stands for the group.
  records = [run.record("best") for run in group.counted]
  best = metrics.best_record(records, group.config["checkpoint.monitor"])
  run = group.counted[records.index(best)]
  title = f"Best checkpoint of group {group.number}: {group.data}, {group.name}"
  try:
    predictions = load.predict_test(run.folder, run.seed, opened=opened)
    scores = scores_lib.summarize(*predictions)
  except errors.UserError as error:
    lacks = f"the report lacks the checkpoint of group {group.number}"
    _logger.warning("warning: %s: %s", lacks, error)
    return Section(title, [f"This section could not be made: {error}"])
  what = f"the best checkpoint of {run.name}"
  name = f"group{group.number}"
  right, count = np.trace(scores.confusion), scores.confusion.sum()
  note = (
    f"Run {run.name}, seed {run.seed}, after {scores.step:,} steps: {right:,}"
    f" of {count:,} test images are right ({right / count:.2%})."
  )
  figures = [figures_lib.confusion(scores, f"confusion_{name}", what)]
  if scores.mistakes:
    figures.append(figures_lib.mistakes(scores, f"mistakes_{name}", what))
  tables = _score_tables(scores, name, what)
  return Section(title, [note], figures, tables)


def _score_tables(
  scores: scores_lib.Scores, name: str, what: str
) -> list[Table]:
  names, matrix, wrong = scores.class_names, scores.confusion, scores.mistakes
  confused = scores.confused(_MOST_CONFUSED)
  images = matrix.sum(axis=1)
  right = 100 * matrix.diagonal() / np.maximum(images, 1)
  accuracies = np.where(images, right, np.nan)
  return [
    Table(
      f"classes_{name}",
      f"Accuracy of each class, of {what}.",
      Column("class", names),
      Column("test images", images.tolist()),
      Column("accuracy (%)", accuracies.tolist()),
    ),
    Table(
      f"confused_{name}",
      "The most frequent confusions.",
      Column("true class", [true for true, _, _ in confused]),
      Column("predicted class", [predicted for _, predicted, _ in confused]),
      Column("test images", [count for _, _, count in confused]),
    ),
    Table(
      f"confusion_{name}",
      "The confusion matrix: rows are true classes, columns predicted ones.",
      Column("true class", names),
      *map(Column, names, matrix.T.tolist()),
      folded=True,
    ),
    Table(
      f"mistakes_{name}",
      "The most confident mistakes.",
      Column("test image, from 0", [each.position for each in wrong]),
      Column("true class", [each.true for each in wrong]),
      Column("predicted class", [each.predicted for each in wrong]),
      Column("probability (%)", [100 * each.confidence for each in wrong]),
    ),
  ]
