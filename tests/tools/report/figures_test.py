import io
import json
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from resnet_flax.data import types
from resnet_flax.tools.report import figures, runs, scores
from tests.tools.report import workdirs


@pytest.fixture
def groups(tmp_path):
  """Two families at two depths, three seeds of one of them."""
  for depth, accuracy in ((20, 0.7), (56, 0.8)):
    for seed in range(3):
      workdirs.write(
        tmp_path / f"resnet{depth}s{seed}",
        [0.3, 0.5, accuracy + 0.01 * seed],
        seed=seed,
        model__depth=depth,
      )
    workdirs.write(
      tmp_path / f"plain{depth}",
      [0.3, 0.4, 0.6],
      model__name="plain",
      model__depth=depth,
    )
  return runs.group(runs.read(runs.find([tmp_path])))


@pytest.fixture
def drawn(monkeypatch):
  """The figures that are rendered, to look into them."""
  kept = []
  render = figures._render

  def keep(figure, *arguments, **more):
    kept.append(figure)
    return render(figure, *arguments, **more)

  monkeypatch.setattr(figures, "_render", keep)
  return kept


def texts(figure):
  (legend,) = figure.legends
  return [text.get_text() for text in legend.get_texts()]


def summarize(probabilities, labels, class_names=None):
  count, classes = np.shape(probabilities)
  labels = np.array(labels, np.int32)
  images = np.full((count, 32, 32, 3), 127, np.uint8)
  split = types.whole_split(images, labels)
  names = class_names or tuple(f"$class{k}" for k in range(classes))
  dataset = types.Dataset(split, None, split, names, "source")
  probabilities = np.array(probabilities, np.float32)
  return scores.summarize(dataset, labels, probabilities, step=1)


@pytest.fixture
def scored():
  return summarize([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]], [0, 1, 0])


@pytest.mark.parametrize(
  ("metric", "title"),
  [
    ("ema_accuracy", "ema error (%)"),
    ("ema_top5", "ema top-5 error (%)"),
    ("ema_accuracy_of_0", "ema_accuracy_of_0"),  # It is not drawn as an error.
  ],
)
def test_only_what_is_drawn_as_an_error_is_called_one(
  tmp_path, drawn, metric, title
):
  workdirs.write(tmp_path / "a", [0.4, 0.5])
  path = tmp_path / "a" / "metrics.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  for record in lines:
    record[f"test_{metric}"] = 0.25
  path.write_text("".join(json.dumps(record) + "\n" for record in lines))
  groups = runs.group(runs.read([tmp_path / "a"]))
  figures.learning_curves(groups, metric)
  (figure,) = drawn
  assert figure.axes[0].get_ylabel() == title
  value = 75 if "(%)" in title else 0.25
  assert figure.axes[0].lines[0].get_ydata()[0] == value


def test_learning_curves(groups, drawn):
  (rendered,) = figures.learning_curves(groups, "accuracy")
  (figure,) = drawn
  (axes,) = figure.axes
  assert axes.get_xlabel() == "epochs of training"
  assert axes.get_ylabel() == "error (%)"
  assert axes.get_title() == "cifar10"
  train, test = axes.lines[4:6]
  assert groups[2].name == "resnet_v1, depth=20"
  np.testing.assert_allclose(test.get_xdata(), [1, 2, 3])
  np.testing.assert_allclose(test.get_ydata(), [70, 50, 29])
  np.testing.assert_allclose(train.get_ydata(), [75, 55, 34])
  # Test bold, train dashed, of one colour; groups differ in their markers.
  assert test.get_linewidth() > 2 * train.get_linewidth()
  assert (test.is_dashed(), train.is_dashed()) == (False, True)
  assert test.get_color() == train.get_color()
  # The last two lines are for the legend.
  markers = {line.get_marker() for line in axes.lines[:-2]}
  assert len(markers) == len(groups)
  # Shaded where there are several seeds, by their standard deviation.
  assert len(axes.collections) == 2 * 2
  path = axes.collections[1].get_paths()[0].vertices
  last = path[path[:, 0] == 3, 1]
  np.testing.assert_allclose([last.min(), last.max()], [28, 30])
  names = [f"{group.number}: {group.name}" for group in groups]
  assert texts(figure) == [*names, "test", "train"]
  assert "; ".join(names) in rendered.text
  assert "cifar10" in rendered.text


def test_losses(groups, drawn):
  figures.learning_curves(groups, "loss")
  (axes,) = drawn[0].axes
  assert axes.get_ylabel() == "cross-entropy (nats)"
  np.testing.assert_allclose(axes.lines[1].get_ydata(), [1.1, 1.0, 0.8])


def add(folder, metrics, epochs=slice(None)):
  """Adds metrics of an epoch, by their names, to some records of a run."""
  path = folder / "metrics.jsonl"
  records = [json.loads(line) for line in path.read_text().splitlines()]
  for record in records[epochs]:
    record.update({k: make(record["epoch"]) for k, make in metrics.items()})
  path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_metric_of_ones_own_is_drawn(tmp_path, drawn):
  for seed in range(3):
    workdirs.write(tmp_path / str(seed), seed=seed)
  workdirs.write(tmp_path / "without", model__depth=56)
  # One seed is from before it, one has been resumed with it.
  mine = {
    "train_a/$b$": lambda k: -k,
    "val_c": lambda k: k,
    "test_": lambda _: 1,
  }
  add(tmp_path / "1", mine)
  add(tmp_path / "2", mine, slice(1, None))
  groups = runs.group(runs.read(runs.find([tmp_path])))
  names = ["", "a/$b$", "accuracy", "c", "loss", "objective"]
  assert figures.metric_names(groups) == names
  (rendered,) = figures.learning_curves(groups, "a/$b$")
  assert rendered.name == "learning_curves_a__b_"
  assert texts(drawn[0]) == ["1: depth=20", "train"]
  (axes,) = drawn[0].axes
  assert axes.get_ylabel() == r"a/\$b\$"
  np.testing.assert_allclose(axes.lines[0].get_xydata(), [[2, -1], [3, -2]])
  assert axes.get_ylim()[0] < -2
  figures.learning_curves(groups, "c")
  assert texts(drawn[1]) == ["1: depth=20", "val"]
  # Files of other metrics are not those of the accuracy.
  add(tmp_path / "1", {"test_error": lambda k: k})
  groups = runs.group(runs.read(runs.find([tmp_path])))
  (own,) = figures.learning_curves(groups, "error")
  (errors,) = figures.learning_curves(groups, "accuracy")
  assert own.name != errors.name


@pytest.mark.parametrize("every", [4, 40])
def test_few_scores_are_drawn_of_every_group(tmp_path, drawn, every):
  for depth in (8, 14, 20, 26, 32, 38):
    options = {"num_epochs": 40, "eval_every_epochs": every}
    run = tmp_path / str(depth)
    workdirs.write(run, [0.5] * 40, model__depth=depth, **options)
  groups = runs.group(runs.read(runs.find([tmp_path])))
  figures.learning_curves(groups, "accuracy")
  *lines, _, _ = drawn[0].axes[0].lines
  assert len(lines) == 2 * 6
  for line in lines:
    start, _ = line.get_markevery()
    assert start < len(line.get_xdata())


def test_long_names_have_room(tmp_path, drawn):
  paths = [f"/{'long/' * 60}{k}" for k in range(6)]
  for k, path in enumerate(paths):
    workdirs.write(tmp_path / f"{k}", init_from=path)
  groups = runs.group(runs.read(runs.find([tmp_path])))
  figures.learning_curves(groups, "accuracy")
  named = [text.replace("\n", "") for text in texts(drawn[0])[:6]]
  assert [name.rpartition("=")[2] for name in named] == paths
  (legend,) = drawn[0].legends
  assert legend.get_window_extent().width < drawn[0].bbox.width
  assert drawn[0].axes[0].get_window_extent().height > 300


def test_many_groups_are_drawn_on_the_same_axes(tmp_path, drawn):
  for depth in range(8, 8 + 6 * 13, 6):
    workdirs.write(tmp_path / f"{depth}", model__depth=depth)
  groups = runs.group(runs.read(runs.find([tmp_path])))
  rendered = figures.learning_curves(groups, "accuracy")
  assert [figure.name for figure in rendered] == [
    f"learning_curves_error_{number}" for number in (1, 2, 3)
  ]
  assert len({figure.axes[0].get_ylim() for figure in drawn}) == 1
  assert len({figure.axes[0].get_xlim() for figure in drawn}) == 1
  named = [name for figure in drawn for name in texts(figure)[:-2]]
  assert named == [f"{group.number}: {group.name}" for group in groups]


@pytest.mark.parametrize(
  ("accuracies", "limits"),
  [
    ([0.1, 0.5, 0.93], (0, 21)),  # As in the papers: three times the last.
    ([0.9, 1.0, 1.0], (0, 1.5)),  # No mistake at the end.
    ([0.5, 0.52, 0.51], (43.2, 57.75)),  # Zero is far away.
  ],
)
def test_limits_of_the_axis(tmp_path, drawn, accuracies, limits):
  workdirs.write(tmp_path / "run", accuracies)
  groups = runs.group(runs.read(runs.find([tmp_path])))
  figures.learning_curves(groups, "accuracy")
  np.testing.assert_allclose(drawn[0].axes[0].get_ylim(), limits)


def test_unfinished_is_in_the_legend(tmp_path, drawn):
  workdirs.write(tmp_path / "run", [0.5])
  workdirs.write(tmp_path / "none", [], model__depth=56)
  groups = runs.group(runs.read(runs.find([tmp_path])))
  figures.learning_curves(groups, "accuracy")
  assert texts(drawn[0])[:-2] == ["1: depth=20 (unfinished)"]


def test_no_epoch_yet(tmp_path):
  workdirs.write(tmp_path / "run", [])
  groups = runs.group(runs.read(runs.find([tmp_path])))
  assert figures.learning_curves(groups, "accuracy") == []
  assert figures.depth(groups) is None


def test_depth(groups, drawn):
  rendered = figures.depth(groups)
  (axes,) = drawn[0].axes
  assert "depth" in axes.get_xlabel()
  assert "(%)" in axes.get_ylabel()
  assert texts(drawn[0]) == ["plain", "resnet_v1"]
  plain, resnet = axes.containers
  np.testing.assert_allclose(plain[0].get_xydata(), [[20, 40], [56, 40]])
  np.testing.assert_allclose(resnet[0].get_xydata(), [[20, 29], [56, 19]])
  # Bars of one standard deviation, which is one percent.
  segments = resnet[2][0].get_segments()
  np.testing.assert_allclose(segments[0], [[20, 28], [20, 30]])
  assert plain[0].get_marker() != resnet[0].get_marker()
  assert rendered.name == "depth"


def test_depth_needs_two(tmp_path):
  workdirs.write(tmp_path / "a", model__depth=20)
  workdirs.write(tmp_path / "b", model__depth=56, model__name="plain")
  # Not finished: what it would become is not known.
  workdirs.write(tmp_path / "c", [0.5], model__depth=32)
  groups = runs.group(runs.read(runs.find([tmp_path])))
  assert figures.depth(groups) is None


def test_wide_range_of_depths(tmp_path, drawn):
  for depth in (20, 56, 1202):
    workdirs.write(tmp_path / f"{depth}", model__depth=depth)
  figures.depth(runs.group(runs.read(runs.find([tmp_path]))))
  (axes,) = drawn[0].axes
  assert axes.get_xscale() == "log"
  labels = [label.get_text() for label in axes.get_xticklabels()]
  assert labels == ["20", "56", "1202"]


def test_confusion(scored, drawn):
  figures.confusion(scored, "confusion", "a checkpoint")
  axes, bar = drawn[0].axes
  numbers = [text.get_text() for text in axes.texts]
  # Row by row: of class 0 one is right, of class 1 none.
  assert numbers == ["1", "1", "1", "0"]
  assert bar.get_ylabel() == "share of the true class (%)"
  shown = np.asarray(axes.images[0].get_array())
  np.testing.assert_allclose(shown, [[50, 50], [100, 0]])


def test_confusion_of_many_classes_has_no_numbers(drawn):
  probabilities = np.eye(100, dtype=np.float32)
  scored = summarize(probabilities, np.arange(100))
  figures.confusion(scored, "confusion", "a checkpoint")
  assert len(drawn[0].axes[0].texts) == 0


def test_names_of_classes_may_hold_any_character():
  """An escape character would make the SVG no XML."""
  names = ("\x1b[31m", "a\nb")
  scored = summarize([[0.9, 0.1], [0.8, 0.2]], [0, 1], names)
  for figure in (figures.confusion, figures.mistakes):
    ElementTree.fromstring(figure(scored, "name", "what").svg)


def test_mistakes(scored, drawn):
  figures.mistakes(scored, "mistakes", "a checkpoint")
  shown = [axes for axes in drawn[0].axes if axes.images]
  assert [axes.get_title() for axes in shown] == [
    "true: \\$class1\npredicted: \\$class0\nwith 80.0%",
    "true: \\$class0\npredicted: \\$class1\nwith 70.0%",
  ]
  assert (np.asarray(shown[0].images[0].get_array()) == 127).all()


def test_same_input_same_bytes(groups, scored):
  def everything():
    return [
      *figures.learning_curves(groups, "accuracy"),
      figures.depth(groups),
      figures.confusion(scored, "confusion", "a checkpoint"),
      figures.mistakes(scored, "mistakes", "a checkpoint"),
    ]

  before = everything()
  # Whatever the user has set.
  with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "none"}):
    assert everything() == before
  for rendered in before:
    assert Image.open(io.BytesIO(rendered.png)).width > 300
    root = ElementTree.fromstring(rendered.svg)
    assert root.tag.endswith("svg")
    # Nothing is fetched.
    links = re.findall(rb'href="([^"]*)"', rendered.svg)
    assert all(link.startswith((b"#", b"data:")) for link in links)
