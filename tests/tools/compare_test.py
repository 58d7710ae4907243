"""The command line and its numbers as a user meets them."""

import csv
import json
import re
import shutil

import jax
import numpy as np
import pytest
from scipy import stats

from resnet_flax import train
from resnet_flax.data import dataset as dataset_lib
from resnet_flax.run import errors, load, mirror, surroundings
from resnet_flax.tools import compare as command, comparison
from resnet_flax.tools.report import intervals
from tests.helpers import ROOT, run_module
from tests.tools.report import workdirs

A, B = [0.91, 0.93, 0.925, 0.915], [0.90, 0.905, 0.92, 0.91]


def write(folder, accuracies, data="digits", **overrides):
  """A workdir of one epoch, with an accuracy for each seed."""
  epoch = accuracies if len(accuracies) > 1 else accuracies[0]
  workdirs.write(
    folder, [epoch], num_seeds=len(accuracies), num_epochs=1, **overrides
  )
  text = f'{{"data": "{data}", "cpu_model": "{folder.name}\'s"}}'
  (folder / "environment.json").write_text(text)
  return folder


def compare(a, b, metric="accuracy", which="best", images=False):
  """The tables by their names."""
  tables = comparison.compare([a], [b], metric, which, images=images)
  return {table.name: table for table in tables}


def numbers(table, row):
  """A row by the titles of CSV."""
  return list(csv.DictReader(table.to_csv().splitlines()))[row]


def check(row, a, b, test, factor=100):
  """A row says what SciPy says."""
  low, high = test.confidence_interval(0.95)
  expected = {
    **{"A mean": np.mean(a), "B mean": np.mean(b)},
    **{"A - B": np.mean(a) - np.mean(b), "from": low, "to": high},
  }
  for key, value in expected.items():
    np.testing.assert_allclose(float(row[key]), factor * value, rtol=1e-9)
  np.testing.assert_allclose(float(row["p"]), test.pvalue, rtol=1e-9)


def test_seeds(tmp_path):
  a = write(tmp_path / "a", A)
  b = write(tmp_path / "b", B[:3], seed=1)
  tables = compare(a, b)
  welch, paired, needed = (numbers(tables["comparison"], k) for k in range(3))
  check(welch, A, B[:3], stats.ttest_ind(A, B[:3], equal_var=False))
  assert welch["n"] == "4, 3"
  # The seeds of A are 0 to 3, those of B 1 to 3.
  check(paired, A[1:], B[:3], stats.ttest_rel(A[1:], B[:3]))
  assert re.match(r"\d+ seeds per side", needed["note"])
  assert "warnings" not in tables


def test_a_mirror_is_a_side(tmp_path):
  a, disk = write(tmp_path / "a", A), str(tmp_path / "disk")
  with mirror.Mirror(disk, a):
    pass
  row = numbers(compare(disk, a)["comparison"], 0)
  assert (row["n"], float(row["A - B"])) == ("4, 4", 0)


def test_groups_of_runs_are_their_seeds(tmp_path):
  for k, accuracy in enumerate(A):
    write(tmp_path / "a" / str(k), [accuracy], seed=k)
  b = write(tmp_path / "b", B)
  row = numbers(compare(tmp_path / "a", b, "loss")["comparison"], 0)
  a_loss, b_loss = 1.4 - np.array(A), 1.4 - np.array(B)
  test = stats.ttest_ind(a_loss, b_loss, equal_var=False)
  check(row, a_loss, b_loss, test, factor=1)


def test_epochs(tmp_path):
  a = workdirs.write(tmp_path / "a", [0.5, 0.7, 0.6])
  b = workdirs.write(tmp_path / "b", [0.5, 0.4], num_epochs=2)
  for which, difference in (("best", 20), ("last", 20)):
    table = compare(a, b, which=which)["comparison"]
    assert float(numbers(table, 0)["A - B"]) == pytest.approx(difference)
  assert float(numbers(table, 0)["A mean"]) == pytest.approx(60)
  assert "last epochs" in table.caption


def test_an_epoch_that_is_not_scored(tmp_path):
  """The last epoch of A, which was stopped before its next score."""
  options = {"num_epochs": 4, "eval_every_epochs": 2}
  a = workdirs.write(tmp_path / "a", [0.5, 0.7, 0.6], **options)
  b = workdirs.write(tmp_path / "b", [0.5, 0.4, 0.4, 0.4], **options)
  log = a / "metrics.jsonl"
  *scored, last = map(json.loads, log.read_text().splitlines())
  last = {k: v for k, v in last.items() if not k.startswith("test_")}
  log.write_text("".join(json.dumps(r) + "\n" for r in [*scored, last]))
  tables = compare(a, b)
  assert float(numbers(tables["comparison"], 0)["A - B"]) == pytest.approx(20)
  # Neither folder says which data it was trained on; then one does.
  for _ in range(2):
    assert "the data may differ" in compare(a, b)["warnings"].to_csv()
    (b / "environment.json").write_text('{"data": "digits"}')
  with pytest.raises(errors.ConfigError, match=r"last epoch .* --which=best"):
    compare(a, b, which="last")


def test_seeds_that_have_not_finished_are_named(tmp_path):
  """A network that diverges never finishes, so the rest is a biased choice."""
  for seed, accuracies in enumerate(([0.9], [0.8], [0.7, 0.9], [0.6, 0.9])):
    options = {"num_epochs": 2, "seed": seed}
    workdirs.write(tmp_path / "a" / str(seed), accuracies, **options)
  b = workdirs.write(
    tmp_path / "b", [[0.8, 0.9]] * 2, num_epochs=2, num_seeds=2
  )
  tables = compare(tmp_path / "a", b, which="last")
  assert numbers(tables["comparison"], 0)["n"] == "2, 2"
  left_out = "unfinished seeds of A are left out: 0, 1"
  assert left_out in tables["warnings"].to_csv()
  assert "seeds of B" not in tables["warnings"].to_csv()


def test_one_seed_cannot_tell(tmp_path):
  a, b = write(tmp_path / "a", A[:1]), write(tmp_path / "b", B[:1])
  welch, needed = (numbers(compare(a, b)["comparison"], k) for k in range(2))
  assert float(welch["A - B"]) == pytest.approx(1)
  assert (welch["from"], welch["to"], welch["p"]) == ("", "", "")
  assert welch["note"].startswith("cannot tell: a side has one seed")
  assert needed["note"].startswith("cannot tell")


def test_rounding_is_no_spread():
  a, b = np.array([97.22, 96.94]), np.array([96.94, 96.66])
  assert intervals.interval(a, b, paired=True) is None
  same = np.full(3, 97.22)
  assert intervals.interval(same, same - 1, paired=False) is None
  assert intervals.interval(a, same, paired=False) is not None


def test_seeds_needed():
  """Cohen's tables, for standard deviations of one."""
  values = np.array([-1, 1]) / np.sqrt(2)
  found = [
    intervals.seeds_needed(values, values[::-1], d) for d in (0.2, 0.5, 0.8, 1)
  ]
  assert found == [394, 64, 26, 17]
  assert intervals.seeds_needed(np.ones(1), np.ones(1), 0.2) is None


def test_seeds_needed_have_the_power():
  rng = np.random.default_rng(0)
  values = np.array([-1, 1]) / np.sqrt(2)
  n = intervals.seeds_needed(values, values, 1)
  for count, enough in ((n, True), (n - 1, False)):
    a, b = (
      rng.normal(1, 1, (40_000, count)),
      rng.normal(0, 1, (40_000, count)),
    )
    power = np.mean(stats.ttest_ind(a, b, axis=1).pvalue < 0.05)
    assert (power > 0.8) == enough


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seeds", "same seeds", "images"])
def test_intervals_cover(kind):
  rng = np.random.default_rng(0)

  def draw():
    if kind == "seeds":
      return rng.normal(1, 1, 5), rng.normal(0, 2, 5), 1
    if kind == "same seeds":
      common = rng.normal(0, 1, 5)
      return common + rng.normal(1, 1, 5), common + rng.normal(0, 0.5, 5), 1
    # Two networks that both are right on easy images.
    easy = rng.random(1000)
    a, b = easy + 0.2 * rng.random((2, 1000))
    return (100.0 * (a > 0.3), 100.0 * (b > 0.32), 2)

  covered = 0
  for _ in range(4000):
    a, b, difference = draw()
    found = intervals.interval(a, b, paired=kind != "seeds")
    covered += found[0] <= difference <= found[1]
  assert 0.94 <= covered / 4000 <= 0.96


@pytest.mark.parametrize(("a", "b"), [(3, 9), (0, 5), (0, 0), (7, 7)])
def test_mcnemar(a, b):
  right_a = np.array([True] * a + [False] * b + [True] * 4 + [False] * 2)
  right_b = np.array([False] * a + [True] * b + [True] * 4 + [False] * 2)
  # Twice the smaller tail of a fair coin.
  p = min(1, 2 * stats.binom.cdf(min(a, b), a + b, 0.5))
  np.testing.assert_allclose(intervals.mcnemar(right_a, right_b), p, rtol=1e-9)


def test_what_differs_and_warnings(tmp_path):
  a = write(tmp_path / "a_&", A, model__depth=32)
  b = write(tmp_path / "b", B, data="other")
  (b / "config.json").write_text(
    (b / "config.json")
    .read_text()
    .replace('"num_epochs": 1', '"num_epochs": 2')
  )
  tables = comparison.compare([a], [b], "accuracy", "best", images=True)
  assert [t.name for t in tables] == ["warnings", "comparison", "differences"]
  assert tables[0].shown_rows() == [
    ("warning",),
    ("the data differ: A has digits, B has other",),
    ("unequal or missing epochs: A 1 of 1, B 1 of 2",),
  ]
  differing = {row[0]: [*row[1:]] for row in tables[2].shown_rows()[1:]}
  assert differing == {
    "data": ["digits", "other"],
    "model.depth": ["32", "20"],
    "cpu_model": ["a_&'s", "b's"],
    "num_epochs": ["1", "2"],
    "runs": [str(a), str(b)],
  }
  # Scored on other images nothing is paired.
  assert not any("images" in row[0] for row in tables[1].shown_rows())


def test_mistakes(tmp_path):
  a, b = write(tmp_path / "a", A), write(tmp_path / "b", B)
  with pytest.raises(errors.ConfigError) as caught:
    compare(a, b, "acuracy")
  assert "'test_accuracy'" in str(caught.value)
  assert "train_loss" in str(caught.value)
  write(tmp_path / "more" / "c", A, model__depth=32)
  write(tmp_path / "more" / "d", A)
  with pytest.raises(errors.ConfigError, match=r"A has runs .* in model.depth"):
    compare(tmp_path / "more", b)
  empty = workdirs.write(tmp_path / "empty", [])
  with pytest.raises(errors.WorkdirError, match="empty has no finished epoch"):
    compare(a, empty)


def test_formats(tmp_path):
  a, b = write(tmp_path / "a_&", A), write(tmp_path / "b", B)
  table = compare(a, b)["differences"]
  paths = f"{a} & {b}".replace("_", r"\_").replace("_& ", r"_\& ")
  rows = table.to_latex().splitlines()
  assert rows[1:4] == [r"\begin{tabular}{lll}", r"key & A & B \\", r"\hline"]
  assert rows[4] == r"cpu\_model & a\_\&'s & b's \\"
  assert rows[5:] == [rf"runs & {paths} \\", r"\end{tabular}"]
  lines = table.to_text().splitlines()
  assert lines[:2] == ["What differs:", f"key        {'A':{len(str(a))}}  B"]
  assert lines[3] == f"runs       {a}  {b}"


@pytest.fixture(scope="module")
def trained(of_two_seeds, make_tiny_config, tmp_path_factory):
  """Two runs of two seeds, whose learning rates differ."""
  folder = tmp_path_factory.mktemp("compared")
  config = make_tiny_config(of_two_seeds.parent / "cache")
  config.num_seeds = 2
  config.optimizer.learning_rate = 1e-2
  train.train_and_evaluate(config, folder / "b", devices=jax.devices()[:1])
  shutil.copytree(of_two_seeds, folder / "a")
  return folder


@pytest.mark.slow
def test_images(trained, monkeypatch):
  loaded, open_data = [], dataset_lib.load
  found, predict_test = {}, load.predict_test

  def load_data(config):
    loaded.append(config.name)
    return open_data(config)

  def predict(workdir, seed, *arguments, **options):
    found[workdir.name, seed] = predict_test(
      workdir, seed, *arguments, **options
    )
    return found[workdir.name, seed]

  with monkeypatch.context() as patch:
    patch.setattr(dataset_lib, "load", load_data)
    patch.setattr(load, "predict_test", predict)
    tables = compare(trained / "a", trained / "b", which="last", images=True)
  assert loaded == ["digits"]  # Once, for two seeds on each side.
  welch, _, _, images, mcnemar = (
    numbers(tables["comparison"], k) for k in range(5)
  )
  right = []
  for name in "ab":
    of_side = [found[name, seed] for seed in (0, 1)]
    assert [each.step for each in of_side] == [8, 8]
    right.append(sum(x.probabilities.argmax(1) == x.labels for x in of_side))
  a, b = (each / 2 for each in right)
  check(images, a, b, stats.ttest_rel(a, b))
  assert images["n"] == "360, 360"
  # What the runs recorded.
  for side in "AB":
    np.testing.assert_allclose(
      float(images[f"{side} mean"]), float(welch[f"{side} mean"]), rtol=1e-6
    )
  more = int(np.sum(a > b)), int(np.sum(a < b))
  p = stats.binomtest(more[0], sum(more)).pvalue
  np.testing.assert_allclose(float(mcnemar["p"]), p, rtol=1e-9)
  assert mcnemar["note"].startswith(f"A is better on {more[0]} images")


@pytest.mark.slow
def test_without_the_data(trained, monkeypatch):
  def gone(*arguments):
    raise errors.DataError("there is no such data")

  monkeypatch.setattr(dataset_lib, "load", gone)
  table = compare(trained / "a", trained / "b", images=True)["comparison"]
  assert numbers(table, 3)["note"] == "left out: there is no such data"


@pytest.mark.slow
@pytest.mark.parametrize(
  "command",
  re.findall(
    r"-m resnet_flax\.compare (.*)", (ROOT / "docs/use.md").read_text()
  ),
)
def test_commands_of_the_page(trained, command):
  for place, name in (("runs/v1_depth20", "a"), ("runs/plain", "b")):
    command = re.sub(rf"{place}\S*", str(trained / name), command)
  arguments = command.partition(" > ")[0].split()
  done = run_module("resnet_flax.compare", *arguments)
  assert done.returncode == 0, done.stderr
  assert "A - B" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "code", "message"),
  [
    (["x"], 2, "arguments are required: --with"),
    (["x", "--with", "y"], 1, "x cannot be read: No such file"),
    (["{a}", "--with", "{a}", "--metric=f1"], 2, "--metric='f1' is not known"),
    (["x", "--with", "y", "--format=pdf"], 2, "invalid choice: 'pdf'"),
  ],
)
def test_mistakes_end_in_one_line(tmp_path, arguments, code, message):
  a = write(tmp_path / "a", A)
  arguments = [text.format(a=a) for text in arguments]
  done = run_module("resnet_flax.compare", *arguments)
  assert (done.returncode, done.stdout) == (code, "")
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ")
  assert message in line


def test_with_may_be_repeated(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(surroundings, "set_up", lambda: None)
  a = write(tmp_path / "a", A)
  sides = [
    ("--with", str(write(tmp_path / str(k), [x], seed=k)))
    for k, x in enumerate(B)
  ]
  command.main(["compare", str(a), *sum(sides, ()), "--no-images"])
  assert " 4, 4 " in capsys.readouterr().out


def test_unfinished_runs(tmp_path):
  """Their checkpoints and their numbers may be of different epochs."""
  a = workdirs.write(tmp_path / "a", [0.5, 0.6], num_epochs=3)
  b = workdirs.write(tmp_path / "b", [0.5, 0.6, 0.7], num_epochs=3)
  for folder in (a, b):
    (folder / "environment.json").write_text('{"data": "digits"}')
  table = comparison.compare([a], [b], "accuracy", "last", images=True)[1]
  assert "left out: checkpoints of unfinished runs may be" in table.to_csv()
  log = a / "metrics.jsonl"
  unscored = [
    {k: v for k, v in json.loads(line).items() if not k.startswith("test_")}
    for line in log.read_text().splitlines()
  ]
  for folder in (a, b):
    config = folder / "config.json"
    options = json.loads(config.read_text()) | {"eval_every_epochs": 3}
    config.write_text(json.dumps(options))
  log.write_text("".join(json.dumps(each) + "\n" for each in unscored))
  with pytest.raises(errors.ConfigError, match="no scored epoch yet"):
    comparison.compare([a], [b], "train_accuracy", "best", images=False)
