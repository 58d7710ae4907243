import csv
import errno
import html.parser
import json
import logging
import os
import pathlib
import shutil

import numpy as np
import pytest
from scipy import stats

from resnet_flax.data import dataset as dataset_lib
from resnet_flax.run import errors, load
from resnet_flax.tools.report import report
from tests.tools.report import workdirs

VOID = {"img", "link", "meta"}


class Page(html.parser.HTMLParser):
  """A page's elements and text; fails where they are not nested."""

  def __init__(self, path):
    super().__init__()
    self.elements, self.texts, self._open = [], [], []
    self.feed(pathlib.Path(path).read_text())
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data.strip())

  @property
  def text(self):
    return "\n".join(self.texts)

  def of(self, tag):
    return [attributes for name, attributes in self.elements if name == tag]


def listed(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


@pytest.fixture
def two_runs(tmp_path):
  """A folder with two runs without checkpoints."""
  workdirs.write(tmp_path / "runs" / "deep", model__depth=56)
  workdirs.write(tmp_path / "runs" / "shallow", model__depth=20)
  return tmp_path / "runs"


def test_a_mirror_is_a_run(mirrored, tmp_path):
  assert report.make([mirrored], tmp_path / "out", "none").num_runs == 1


def test_everything_is_there(trained, tmp_path):
  done = report.make([trained], tmp_path / "out")
  assert (done.num_runs, done.num_groups) == (1, 1)
  curves = ["error", "loss", "objective", "top5"]
  names = [f"learning_curves_{metric}" for metric in curves]
  names += ["confusion_group1", "mistakes_group1"]
  tables = ["accuracy", "same", "runs", "classes_group1"]
  tables += ["confused_group1", "confusion_group1", "mistakes_group1"]
  files = listed(tmp_path / "out")
  assert files.keys() == {
    "index.html",
    *(f"figures/{name}.{kind}" for name in names for kind in ("png", "svg")),
    *(f"tables/{name}.{kind}" for name in tables for kind in ("md", "csv")),
  }
  page = Page(done.page)
  assert len(page.of("img")) == len(names)
  assert len(page.of("table")) == len(tables)
  records = [
    json.loads(line)
    for line in (trained / "metrics.jsonl").read_text().splitlines()
  ]
  best = max(record["test_accuracy"] for record in records)
  assert f"{100 * best:.2f}" in page.texts
  assert f"({best:.2%})" in page.text
  assert f"{100 * best:.10g}".encode() in files["tables/accuracy.csv"]
  assert "test_accuracy" in page.texts  # What chose the best epoch.
  # Again, to the same bytes.
  report.make([trained], tmp_path / "again")
  assert listed(tmp_path / "again") == files


def test_page_is_by_itself_and_accessible(two_runs, tmp_path):
  page = Page(report.make([two_runs], tmp_path / "out").page)
  assert page.of("html") == [{"lang": "en"}]
  assert not page.of("script")
  links = [a["src"] for a in page.of("img")]
  links += [a["href"] for a in page.of("a") + page.of("link")]
  assert all(link.startswith(("data:", "#section-")) for link in links)
  targets = {f"#{a['id']}" for _, a in page.elements if "id" in a}
  assert {link for link in links if link.startswith("#")} <= targets
  assert all(len(a["alt"]) > 20 for a in page.of("img"))
  assert all(a.get("scope") for a in page.of("th"))
  # What tells the groups apart.
  assert {"model.depth", "group 1", "20", "56"} <= set(page.texts)


def test_hostile_names_are_text(tmp_path):
  name = "<script>alert(1)<\x1b$ &amp; '\""
  workdirs.write(tmp_path / name, init_from="</style><b>$x")
  workdirs.write(tmp_path / "other", init_from="${")
  page = Page(report.make([tmp_path], tmp_path / "out").page)
  assert not page.of("script")
  assert not page.of("b")
  assert name.replace("\x1b", r"\x1b") in page.texts
  assert "init_from=</style><b>$x" in page.text


def test_unfinished_and_empty_runs_are_listed(tmp_path):
  workdirs.write(tmp_path / "begun", [0.5])
  workdirs.write(tmp_path / "empty", [], model__depth=56)
  workdirs.write(tmp_path / "done", seed=1)
  workdirs.write(tmp_path / "also", [0.2, 0.3], seed=2)
  page = Page(report.make([tmp_path], tmp_path / "out").page)
  assert "1 of 3, unfinished" in page.texts
  assert "0 of 3, unfinished" in page.texts
  with (tmp_path / "out/tables/runs.csv").open() as file:
    counted = {row["run"]: row["counted"] for row in csv.DictReader(file)}
  no = dict.fromkeys(("also", "begun", "empty"), "no")
  assert counted == {"done": "yes"} | no


def test_no_epoch_at_all(tmp_path):
  workdirs.write(tmp_path / "empty", [])
  page = Page(report.make([tmp_path], tmp_path / "out").page)
  assert "No run has finished an epoch yet." in page.texts
  assert not page.of("img")


def test_chosen_on_validation(tmp_path):
  folder = workdirs.write(tmp_path / "run", [0.5])
  record = workdirs.make_record(0, 0.5, val_accuracy=0.4)
  (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
  page = Page(report.make([tmp_path], tmp_path / "out").page)
  assert "val_accuracy" in page.texts
  assert "test_accuracy" not in page.texts


def test_ensembles_of_several_seeds(tmp_path, caplog):
  accuracies = [[0.5, 0.6], [0.7, 0.9], [0.6, 0.8]]
  workdirs.write(tmp_path / "run", accuracies, seed=3, num_seeds=2)
  with caplog.at_level(logging.WARNING):
    page = Page(report.make([tmp_path], tmp_path / "out").page)
  # Mean and deviation over the seeds, though it is one run.
  table = (tmp_path / "out" / "tables" / "accuracy.md").read_text()
  assert "depth=20 | 2 | 3 of 3 | 70.00 ± 14.14 | 80.00 ± 14.14" in table
  assert {"3", "4", "95.00"} <= set(page.texts)
  assert "has no best checkpoint" in page.text
  assert "has no best checkpoint" in caplog.text


@pytest.mark.parametrize(
  ("scored", "groups"), [("best", [2, 3]), ("each", [1, 2, 3]), ("none", [])]
)
def test_whose_checkpoint_is_scored(tmp_path, monkeypatch, scored, groups):
  workdirs.write(tmp_path / "a", [0.4, 0.5], model__name="plain")
  workdirs.write(tmp_path / "b", [0.6, 0.5], seed=1)
  workdirs.write(tmp_path / "c", [0.5, 0.7], seed=2)
  workdirs.write(tmp_path / "d", [0.1], model__name="plain", model__depth=56)
  for name, data in (("a", 10), ("b", 10), ("c", 10), ("d", 100)):
    path = tmp_path / name / "config.json"
    config = json.loads(path.read_text())
    config["dataset"]["name"] = f"cifar{data}"
    path.write_text(json.dumps(config))
  asked = []

  def predict_test(workdir, seed, opened):
    asked.append((workdir.name, seed))
    raise errors.DataError("none here.")

  monkeypatch.setattr(load, "predict_test", predict_test)
  page = Page(report.make([tmp_path], tmp_path / "out", scored).page)
  assert page.text.count("This section could not be made: none here.") == len(
    groups
  )
  # Of a group the best run.
  best = {1: ("a", 0), 2: ("c", 2), 3: ("d", 0)}
  assert asked == [best[number] for number in groups]


def test_a_group_without_scores_is_not_the_best(tmp_path, monkeypatch):
  """Its first score is of a later epoch."""
  workdirs.write(
    tmp_path / "a", [0.5], model__name="plain", eval_every_epochs=2
  )
  workdirs.write(tmp_path / "b", [0.4], seed=2024)
  path = tmp_path / "a/metrics.jsonl"
  record = json.loads(path.read_text())
  kept = {k: v for k, v in record.items() if not k.startswith("test_")}
  path.write_text(json.dumps(kept) + "\n")
  asked = []

  def predict_test(workdir, seed, opened):
    asked.append((workdir.name, seed))
    raise errors.DataError("none here.")

  monkeypatch.setattr(load, "predict_test", predict_test)
  page = Page(report.make([tmp_path], tmp_path / "out", "best").page)
  assert asked == [("b", 2024)]
  assert "2024" in page.texts  # Not 2,024: it is no quantity.


def test_each_figure_is_of_one_data_set(tmp_path):
  for depth in (20, 56):
    for data in ("cifar10", "digits"):
      workdirs.write(
        tmp_path / f"{data}{depth}", dataset__name=data, model__depth=depth
      )
  done = report.make([tmp_path], tmp_path / "out", "none")
  names = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
  assert names == {
    f"{what}_{data}.{kind}"
    for what in (
      *("learning_curves_error", "learning_curves_loss"),
      *("learning_curves_objective", "depth"),
    )
    for data in ("cifar10", "digits")
    for kind in ("png", "svg")
  }
  for image in Page(done.page).of("img"):
    assert ("cifar10" in image["alt"]) != ("digits" in image["alt"])
  rows = (tmp_path / "out" / "tables" / "accuracy.md").read_text().splitlines()
  assert [row.split(" | ")[1:3] for row in rows[4:]] == [
    ["cifar10", "depth=20"],
    ["cifar10", "depth=56"],
    ["digits", "depth=20"],
    ["digits", "depth=56"],
  ]


def test_groups_are_compared_with_the_first_of_their_data(tmp_path):
  finals = {20: (0.6, 0.61, 0.63), 56: (0.7, 0.72, 0.71), 32: (0.5,)}
  for depth, values in finals.items():
    for seed, value in enumerate(values):
      folder = tmp_path / "runs" / f"{depth}-{seed}"
      workdirs.write(folder, [0.1, 0.2, value], seed=seed, model__depth=depth)
  for seed in range(2):  # These are not finished.
    folder = tmp_path / "runs" / f"8-{seed}"
    workdirs.write(folder, [0.1 * seed], seed=seed, model__depth=8)
  report.make([tmp_path / "runs"], tmp_path / "out", "none")
  text = (tmp_path / "out" / "tables" / "intervals.csv").read_text()
  header, row = csv.reader(text.splitlines())
  assert header == ["group", "first", "points", "from", "to"]
  # Of depth 32 there is one seed.
  test = stats.ttest_ind(finals[56], finals[20], equal_var=False)
  low, high = (100 * each for each in test.confidence_interval())
  np.testing.assert_allclose([*map(float, row)], [4, 2, 29 / 3, low, high])


def test_data_that_cannot_be_had(trained, tmp_path, monkeypatch, caplog):
  def load(config):
    raise errors.DataError(f"{config.name} is not here.")

  monkeypatch.setattr(dataset_lib, "load", load)
  with caplog.at_level(logging.WARNING):
    page = Page(report.make([trained], tmp_path / "out").page)
  assert "This section could not be made: digits is not here." in page.texts
  assert len(page.of("img")) == 4
  (record,) = [r for r in caplog.records if r.name == report.__name__]
  assert "group 1: digits is not here." in record.getMessage()


def test_other_files_are_left_alone(two_runs, tmp_path):
  out = tmp_path / "out"
  (out / "figures").mkdir(parents=True)
  (out / "figures" / "mine.png").write_text("mine")
  (out / "index.html").write_text("old")
  report.make([two_runs], out)
  assert (out / "figures" / "mine.png").read_text() == "mine"
  assert Page(out / "index.html").of("h1")
  assert not list(out.rglob("*.tmp"))


def test_a_mistake_changes_nothing(two_runs, tmp_path):
  report.make([two_runs], tmp_path / "out")
  before = listed(tmp_path / "out")
  (two_runs / "deep" / "metrics.jsonl").write_text("{\n{\n")
  with pytest.raises(errors.WorkdirError, match=r"metrics\.jsonl, line 1"):
    report.make([two_runs], tmp_path / "out")
  assert listed(tmp_path / "out") == before


def test_folder_that_cannot_be_written(two_runs, tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  # Found before anything is computed.
  monkeypatch.setattr(report, "_scored", None)
  with pytest.raises(errors.WorkdirError, match=r"--out=.*file cannot be"):
    report.make([two_runs], tmp_path / "file")


def test_full_disk_leaves_whole_files(two_runs, tmp_path, monkeypatch):
  out = tmp_path / "out"
  report.make([two_runs], out)
  before = listed(out)
  shutil.rmtree(two_runs / "deep")
  replace = os.replace
  room = [3]

  def fill(source, target):
    room[0] -= 1
    if room[0] < 0:
      raise OSError(errno.ENOSPC, "No space left on device")
    replace(source, target)

  monkeypatch.setattr(os, "replace", fill)
  with pytest.raises(errors.WorkdirError, match="No space left on device"):
    report.make([two_runs], out)
  after = listed(out)
  # The page is the old one, and nothing is torn.
  assert after.keys() == before.keys()
  assert after["index.html"] == before["index.html"]
  assert sum(after[name] != before[name] for name in before) == 3


def test_times_and_top5_where_runs_have_them(tmp_path):
  """Older runs did not record them."""
  more = {"test_top5": 0.95, "data_seconds": 2.0, "evaluation_seconds": 3.0}
  for name, added in (("new", more), ("old", {})):
    config = workdirs.make_config(model__depth=20 if added else 32)
    workdirs.write(tmp_path / "runs" / name, (0.5, 0.6), config=config)
    path = tmp_path / "runs" / name / "metrics.jsonl"
    records = [workdirs.make_record(k, 0.5 + 0.1 * k, **added) for k in (0, 1)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
  report.make([tmp_path / "runs"], tmp_path / "out", "none")

  def rows(name):
    with (tmp_path / f"out/tables/{name}.csv").open() as file:
      return list(csv.DictReader(file))

  new, old = rows("accuracy")
  assert new["final test top-5 accuracy (%) mean"] == "95"
  assert old["final test top-5 accuracy (%) mean"] == ""
  new, old = rows("runs")
  assert (new["waiting for data (s)"], new["evaluation (s)"]) == ("2", "3")
  assert old["evaluation (s)"] == ""
  assert (tmp_path / "out/figures/learning_curves_top5.svg").exists()
