import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import resnet_flax
from resnet_flax import data as datasets, train
from resnet_flax.run import errors, load as inference, metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A trained run: its configuration, workdir and records."""
  from configs import base

  config = base.get_config()
  config.batch_size, config.num_epochs, config.eval_batch_size = 8, 3, 100
  config.dataset.name = "digits"
  config.dataset.train_examples = 64
  config.model.update({"depth": 8, "num_filters": 4})
  config.model.batch_norm_momentum = 0.5
  workdir = tmp_path_factory.mktemp("run")
  records = train.train_and_evaluate(config, workdir, devices=jax.devices()[:1])
  return config, workdir, records


@pytest.mark.parametrize("which", ["best", "latest"])
def test_evaluation_gives_what_training_logged(run, which):
  _, workdir, records = run
  record = (
    metrics.best_record(records, "accuracy") if which == "best" else records[-1]
  )
  for devices in (jax.devices()[:1], jax.devices()):
    scores = inference.evaluate_workdir(workdir, which, devices=devices)
    assert scores["epoch"] == record["epoch"]
    assert scores["accuracy"] == record["test_accuracy"]
    assert scores["loss"] == pytest.approx(record["test_loss"], rel=1e-5)


def test_evaluation_leaves_the_workdir_alone(run):
  """It may be of a run that is going on."""
  _, workdir, _ = run
  unfinished = workdir / "checkpoints" / "99.orbax-checkpoint-tmp"
  unfinished.mkdir()
  inference.evaluate_workdir(workdir, devices=jax.devices()[:1])
  assert unfinished.exists()
  unfinished.rmdir()


def test_evaluation_may_look_for_the_data_elsewhere(run):
  config, workdir, records = run
  moved = ConfigDict(config.to_dict())
  moved.eval_batch_size = 7
  moved.model.scan = True
  devices = jax.devices()[:1]
  scores = inference.evaluate_workdir(
    workdir, "latest", config=moved, devices=devices
  )
  assert scores["accuracy"] == records[-1]["test_accuracy"]
  moved.seed = 5
  with pytest.raises(errors.WorkdirError, match="seed"):
    inference.evaluate_workdir(workdir, config=moved, devices=devices)


def test_load_model_predicts(run):
  config, workdir, records = run
  loaded = resnet_flax.load_model(workdir)
  images, labels = datasets.load(config.dataset).test.take(np.arange(360))
  probabilities = loaded.predict(images)
  assert probabilities.shape == (360, 10)
  assert probabilities.dtype == np.float32
  np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
  accuracy = np.mean(probabilities.argmax(-1) == labels)
  best = metrics.best_record(records, "accuracy")
  assert accuracy == pytest.approx(best["test_accuracy"])
  assert loaded.step == best["step"]
  assert loaded.predict(images[:0]).shape == (0, 10)
  logits = loaded.model.apply(
    loaded.variables, jnp.zeros((1, 32, 32, 3)), train=False
  )
  assert logits.shape == (1, 10)


@pytest.mark.parametrize(
  "images",
  [
    np.zeros((1, 32, 32, 3), np.float32),
    np.zeros((32, 32, 3), np.uint8),
    np.zeros((1, 28, 28, 3), np.uint8),
  ],
)
def test_predict_wants_uint8_images(run, images):
  loaded = resnet_flax.load_model(run[1], "latest")
  with pytest.raises(ValueError, match=r"uint8 images of shape \[N, 32, 32, 3"):
    loaded.predict(images)


def test_unknown_checkpoint(run):
  with pytest.raises(errors.ConfigError, match="Did you mean 'latest'"):
    resnet_flax.load_model(run[1], "last")


def test_no_checkpoint_yet(run, tmp_path):
  (tmp_path / "config.json").write_text((run[1] / "config.json").read_text())
  with pytest.raises(errors.WorkdirError, match="has no best checkpoint: "):
    resnet_flax.load_model(tmp_path)


def test_package_has_nothing_else():
  with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
    _ = resnet_flax.load_modle
