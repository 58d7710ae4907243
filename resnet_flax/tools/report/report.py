"""What is in a report, and its files: made as a whole, then written."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from resnet_flax.data import dataset as dataset_lib
from resnet_flax.run import (
  errors,
  files as files_lib,
  load,
  metrics,
  rules,
)
from resnet_flax.tools.report import (
  figures as figures_lib,
  page,
  runs as runs_lib,
  scores as scores_lib,
  tables as tables_lib,
)

_logger = logging.getLogger(__name__)

# Which checkpoints are scored: that of the best group of each data set, of
# each group, or none.
SCORED = ("best", "each", "none")

_MOST_CONFUSED = 10

Column = tables_lib.Column


@dataclasses.dataclass(frozen=True)
class Summary:
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
  out = pathlib.Path(out)
  runs = runs_lib.read(runs_lib.find(paths))
  groups = runs_lib.group(runs)
  with _explain_write_errors(out):
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):
      pass
  sections = [
    _accuracies(groups),
    *_curves(groups),
    _depths(groups),
    _times(groups),
    _configurations(groups),
    _runs(groups),
    *_checkpoints(groups, scored),
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


def _accuracies(groups: Sequence[runs_lib.Group]) -> page.Section:
  notes = [
    "Accuracies and errors are of the test split; “best” is the epoch that"
    " checkpoint.monitor chooses. ± is the sample standard deviation over n"
    " seeds."
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
    not run.finished and bool(run.records)
    for group in groups
    if group.finished
    for run in group.runs
  )
  if left_out:
    notes.append(
      f"Unfinished runs of finished groups are not counted: {left_out}."
    )
  columns = [
    Column("#"),
    Column("group"),
    Column("epochs"),
    Column("final test accuracy (%)", 2, statistic=True),
    Column("best test accuracy (%)", 2, statistic=True),
    Column("final test loss (nats)", 4, statistic=True),
    Column("final train accuracy (%)", 2, statistic=True),
  ]
  rows = [
    [
      group.number,
      group.label,
      _epochs(group.num_epochs, group.config["num_epochs"]),
      _percent(group.final("test_accuracy")),
      _percent(group.best("test_accuracy")),
      group.final("test_loss"),
      _percent(group.final("train_accuracy")),
    ]
    for group in groups
  ]
  table = tables_lib.Table(
    "accuracy", "Final and best accuracy of each group.", columns, rows
  )
  return page.Section("Accuracy", notes=notes, tables=[table])


def _curves(groups: Sequence[runs_lib.Group]) -> list[page.Section]:
  curves = [
    figure
    for metric in (figures_lib.ERROR, figures_lib.LOSS)
    for figure in figures_lib.learning_curves(groups, metric)
  ]
  notes = [] if curves else ["No run has finished an epoch yet."]
  return [page.Section("Learning curves", notes=notes, figures=curves)]


def _depths(groups: Sequence[runs_lib.Group]) -> page.Section:
  figure = figures_lib.depth(groups)
  if figure is None:
    note = "This needs finished groups that differ in model.depth alone."
    return page.Section("Error against depth", notes=[note])
  return page.Section("Error against depth", figures=[figure])


def _times(groups: Sequence[runs_lib.Group]) -> page.Section:
  columns = [
    Column("#"),
    Column("group"),
    Column("seconds per epoch", 1, statistic=True),
    Column("images/s", 0, statistic=True),
    Column("training time (min)", 1, statistic=True),
    Column("trained on"),
  ]
  rows: list[list[tables_lib.Cell]] = []
  for group in groups:
    runs = group.counted_runs
    rows.append(
      [
        group.number,
        group.label,
        _over([r.training_seconds / len(r.records) for r in runs]),
        _over([r.images_per_second for r in runs]),
        _over([r.training_seconds / 60 for r in runs]),
        "; ".join(dict.fromkeys(r.device or "unknown" for r in runs)),
      ]
    )
  note = (
    "The training part of the epochs, without compilation and evaluation; n"
    " counts runs. Where a run trains several seeds, images/s are those of all"
    " seeds together."
  )
  table = tables_lib.Table(
    "time", "Time and speed of each group.", columns, rows
  )
  return page.Section("Time", notes=[note], tables=[table])


def _configurations(groups: Sequence[runs_lib.Group]) -> page.Section:
  configs = [group.config for group in groups]
  differing = runs_lib.differing_keys(configs)
  same = sorted(configs[0].keys() - set(differing))
  tables = []
  if differing:
    tables.append(
      tables_lib.Table(
        "differences",
        "The keys in which the groups differ.",
        [Column("key"), *(Column(f"group {g.number}") for g in groups)],
        [
          [
            key,
            *(
              runs_lib.shown(config[key]) if key in config else None
              for config in configs
            ),
          ]
          for key in differing
        ],
      )
    )
  tables.append(
    tables_lib.Table(
      "same",
      "The keys that have one value in all groups.",
      [Column("key"), Column("value")],
      [[key, runs_lib.shown(configs[0][key])] for key in same],
      folded=True,
    )
  )
  note = (
    "Seeds, and keys that do not change what is computed, do not part groups."
  )
  return page.Section("Configurations", notes=[note], tables=tables)


def _runs(groups: Sequence[runs_lib.Group]) -> page.Section:
  has_ensemble = any(
    "test_ensemble_accuracy" in record
    for group in groups
    for run in group.runs
    for record in run.records
  )
  columns = [
    Column("#"),
    Column("run"),
    Column("seeds"),
    Column("epochs"),
    Column("counted seeds"),
    Column("final test accuracy (%)", 2),
    Column("best test accuracy (%)", 2),
    Column("best epoch, from 1"),
    Column("chosen by"),
    Column("images/s", 0),
    Column("training time (min)", 1),
  ]
  if has_ensemble:
    columns.append(Column("ensemble's final test accuracy (%)", 2))
  rows = []
  for group in groups:
    for run in group.runs:
      counted = [r.seed for r in group.repetitions if r.run is run]
      row: list[tables_lib.Cell] = [
        group.number,
        run.name,
        _ranges(run.seeds),
        _epochs(len(run.records), run.config["num_epochs"]),
        _ranges(counted) or None,
      ]
      if run.records:
        last = run.records[-1]
        best = [run.best_record(seed, len(run.records)) for seed in run.seeds]
        epochs = sorted({record["epoch"] + 1 for record in best})
        row += [
          100 * last["test_accuracy"],
          100 * statistics.fmean(record["test_accuracy"] for record in best),
          ", ".join(map(str, epochs)),
          run.chosen_by,
          run.images_per_second,
          run.training_seconds / 60,
        ]
        ensemble = last.get("test_ensemble_accuracy")
      else:
        row += [None] * 6
        ensemble = None
      if has_ensemble:
        row.append(None if ensemble is None else 100 * ensemble)
      rows.append(row)
  note = (
    "Of a run with several seeds the values are means over them. A seed that"
    " occurs twice in a group is counted once, in the run with more epochs."
  )
  table = tables_lib.Table("runs", "Each run.", columns, rows)
  return page.Section("Runs", notes=[note], tables=[table])


def _checkpoints(
  groups: Sequence[runs_lib.Group], scored: str
) -> list[page.Section]:
  if scored == "none":
    return []
  begun = [group for group in groups if group.num_epochs]
  if scored == "best":
    # Accuracies on other images cannot be compared.
    of_data: dict[str, runs_lib.Group] = {}
    for group in begun:
      best = of_data.setdefault(group.config["dataset.name"], group)
      if _mean_of_best(group) > _mean_of_best(best):
        of_data[group.config["dataset.name"]] = group
    begun = sorted(of_data.values(), key=lambda group: group.number)
  return [_checkpoint(group) for group in begun]


def _mean_of_best(group: runs_lib.Group) -> float:
  best = group.best("test_accuracy")
  assert best is not None
  return best.mean


def _best_network(group: runs_lib.Group) -> tuple[runs_lib.Run, int]:
  """The run and the seed that are the best by `checkpoint.monitor`."""
  networks = [(r.run, r.seed) for r in group.repetitions]
  records = [run.best_record(seed, len(run.records)) for run, seed in networks]
  best = metrics.best_record(records, group.config["checkpoint.monitor"])
  return networks[records.index(best)]


def _checkpoint(group: runs_lib.Group) -> page.Section:
  run, seed = _best_network(group)
  title = f"Best checkpoint of group {group.name}"
  try:
    scores = score(run, seed)
  except errors.UserError as error:
    _logger.warning(
      "warning: the report lacks the checkpoint of group %d: %s",
      group.number,
      error,
    )
    return page.Section(title, notes=[f"This could not be made: {error}"])
  what = f"the best checkpoint of {run.name}"
  name = f"group{group.number}"
  notes = [
    f"Run {run.name}, seed {seed}, after {scores.step:,} steps:"
    f" {scores.num_correct:,} of {scores.num_images:,} test images are right"
    f" ({scores.num_correct / scores.num_images:.2%})."
  ]
  figures = [figures_lib.confusion(scores, f"confusion_{name}", what)]
  if scores.mistakes:
    figures.append(figures_lib.mistakes(scores, f"mistakes_{name}", what))
  else:
    notes.append("No test image is classified wrongly.")
  return page.Section(
    title,
    notes=notes,
    figures=figures,
    tables=_score_tables(scores, name, what),
  )


def _score_tables(
  scores: scores_lib.Scores, name: str, what: str
) -> list[tables_lib.Table]:
  names = scores.class_names
  of_class = scores.confusion.sum(axis=1).tolist()
  right = scores.confusion.diagonal().tolist()
  per_class = tables_lib.Table(
    f"classes_{name}",
    f"Accuracy of each class, of {what}.",
    [Column("class"), Column("test images"), Column("accuracy (%)", 2)],
    [
      [label, images, 100 * correct / images if images else None]
      for label, images, correct in zip(names, of_class, right, strict=True)
    ],
  )
  confused = tables_lib.Table(
    f"confused_{name}",
    "What is taken for what most often.",
    [Column("true class"), Column("predicted class"), Column("test images")],
    [
      [names[i], names[j], count]
      for i, j, count in scores.confused(_MOST_CONFUSED)
    ],
  )
  matrix = tables_lib.Table(
    f"confusion_{name}",
    "The confusion matrix: rows are true classes, columns predicted ones.",
    [Column("true class"), *map(Column, names)],
    [
      [label, *row]
      for label, row in zip(names, scores.confusion.tolist(), strict=True)
    ],
    folded=True,
  )
  wrong = scores.mistakes
  mistakes = tables_lib.Table(
    f"mistakes_{name}",
    "The most confident mistakes.",
    [
      Column("test image, from 0"),
      Column("true class"),
      Column("predicted class"),
      Column("probability (%)", 2),
    ],
    [
      [position, names[label], names[predicted], 100 * confidence]
      for position, label, predicted, confidence in zip(
        wrong.positions.tolist(),
        wrong.labels.tolist(),
        wrong.predicted.tolist(),
        wrong.confidences.tolist(),
        strict=True,
      )
    ],
  )
  return [per_class, confused, matrix, mistakes]


def _percent(value: runs_lib.Statistic | None) -> runs_lib.Statistic | None:
  return None if value is None else value.scaled(100)


def _over(values: Sequence[float]) -> runs_lib.Statistic | None:
  return runs_lib.Statistic.of(values) if values else None


def _epochs(done: int, planned: int) -> str:
  return f"{done} of {planned}" + ("" if done >= planned else ", unfinished")


def _numbers(numbers: Sequence[int]) -> str:
  word = "group" if len(numbers) == 1 else "groups"
  return f"{word} {_ranges(numbers)}"


def _ranges(numbers: Sequence[int]) -> str:
  """Ascending numbers, for example '0–3, 7'."""
  parts: list[list[int]] = []
  for number in numbers:
    if parts and number == parts[-1][-1] + 1:
      parts[-1].append(number)
    else:
      parts.append([number])
  return ", ".join(
    f"{part[0]}–{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts
  )


def score(run: runs_lib.Run, seed: int) -> scores_lib.Scores:
  """Scores a seed's best checkpoint on the test split of its data set.

  Raises:
    ConfigError: its configuration is of another version, or its network is
      not for these classes.
    DataError: the data cannot be had, or is not what the run was trained on.
    WorkdirError: there is no checkpoint, or none that can be read.
  """
  # Before the data, which takes longer.
  loaded = load.load_model(run.folder, seed=seed)
  rules.check_labels(loaded.config)
  dataset = dataset_lib.load(loaded.config.dataset)
  if run.data is not None and run.data != dataset.source:
    raise errors.DataError(
      f"{run.name} was trained on {run.data}, but the data here is"
      f" {dataset.source}. Set TFDS_DATA_DIR to the folder of the former."
    )
  size = loaded.config.eval_batch_size
  everything = np.arange(len(dataset.test))
  order = [everything[start : start + size] for start in everything[::size]]
  scored = [
    (_predict(loaded, images), labels)
    for images, labels in dataset.test.batches(order)
  ]
  probabilities, labels = map(np.concatenate, zip(*scored, strict=True))
  return scores_lib.summarize(
    dataset.test,
    labels,
    probabilities,
    class_names=dataset.class_names,
    step=loaded.step,
  )


def _predict(loaded: load.LoadedModel, images: np.ndarray) -> np.ndarray:
  """Probabilities, means over the crops of an image where it has several."""
  crops = images.reshape(-1, *images.shape[-3:])
  probabilities = loaded.predict(crops)
  return probabilities.reshape(len(images), -1, probabilities.shape[-1]).mean(
    axis=1
  )
