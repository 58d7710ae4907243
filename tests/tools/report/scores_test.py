import json
import shutil

import numpy as np
import pytest

import resnet_flax
from resnet_flax import data as datasets
from resnet_flax.data import types
from resnet_flax.run import errors, load, metrics
from resnet_flax.tools.report import runs, scores


def read(folder):
  (run,) = runs.read([folder])
  return run


def score(run):
  opened = {}
  return scores.summarize(
    *load.predict_test(run.folder, run.seed, opened=opened)
  )


@pytest.fixture
def copied(trained, tmp_path):
  """A copy of a trained workdir, to be changed."""
  shutil.copytree(trained, tmp_path / "run")
  return tmp_path / "run"


def summarize(images, labels, probabilities, class_names):
  split = types.whole_split(images, np.array(labels, np.int32))
  dataset = types.Dataset(split, None, split, class_names, "source")
  probabilities = np.array(probabilities, np.float32)
  return scores.summarize(dataset, np.array(labels), probabilities, step=7)


def test_summarize():
  images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
  probabilities = [
    [0.6, 0.3, 0.1],  # Wrong.
    [0.2, 0.7, 0.1],
    [0.1, 0.0, 0.9],  # Wrong, and surer of it.
    [0.6, 0.2, 0.2],  # Wrong, as sure as the first one.
    [0.0, 0.1, 0.9],
  ]
  scored = summarize(images, [1, 1, 0, 1, 2], probabilities, ("a", "b", "c"))
  np.testing.assert_array_equal(
    scored.confusion, [[0, 0, 1], [2, 1, 0], [0, 0, 1]]
  )
  assert scored.step == 7
  wrong = [
    (each.position, each.image.item(), each.true, each.predicted)
    for each in scored.mistakes
  ]
  assert wrong == [(2, 2, "a", "c"), (0, 0, "b", "a"), (3, 3, "b", "a")]
  confidences = [each.confidence for each in scored.mistakes]
  np.testing.assert_allclose(confidences, [0.9, 0.6, 0.6])
  assert scored.confused(9) == [("b", "a", 2), ("a", "c", 1)]
  assert scored.confused(1) == [("b", "a", 2)]


def test_most_confident_are_kept():
  count = 100
  confidence = np.linspace(0.51, 0.99, count, dtype=np.float32)
  scored = summarize(
    np.zeros((count, 1, 1, 1), np.uint8),
    np.ones(count, np.int32),
    np.stack([confidence, 1 - confidence], axis=1),
    ("a", "b"),
  )
  assert [each.position for each in scored.mistakes] == [*range(99, 74, -1)]


def test_score_is_that_of_the_record(trained):
  run = read(trained)
  scored = score(run)
  best = metrics.best_record(run.records, "accuracy")
  assert scored.step == best["step"]
  assert scored.confusion.sum() == 360
  right = np.trace(scored.confusion)
  assert right / 360 == pytest.approx(best["test_accuracy"])
  # The most confident mistake is one, by the network itself.
  loaded = resnet_flax.load_model(trained)
  dataset = datasets.load(loaded.config.dataset)
  first = scored.mistakes[0]
  images, labels = dataset.test.take(np.array([first.position]))
  np.testing.assert_array_equal(images[0], first.image)
  (probabilities,) = loaded.predict(images)
  names = dataset.class_names
  assert names[np.argmax(probabilities)] == first.predicted
  assert names[labels[0]] == first.true != first.predicted
  assert max(probabilities) == pytest.approx(first.confidence, rel=1e-5)


def test_no_checkpoint(copied):
  shutil.rmtree(copied / "checkpoints")
  with pytest.raises(errors.WorkdirError, match="no best checkpoint"):
    score(read(copied))


def test_other_data(copied):
  path = copied / "environment.json"
  environment = json.loads(path.read_text()) | {"data": "cifar10-1-ab"}
  path.write_text(json.dumps(environment))
  with pytest.raises(errors.WorkdirError, match="cifar10-1-ab there, digits"):
    score(read(copied))


def test_several_seeds(of_two_seeds):
  for run in runs.read([of_two_seeds]):
    best = run.record("best")
    scored = score(run)
    right = np.trace(scored.confusion)
    assert right / 360 == pytest.approx(best["test_accuracy"])
