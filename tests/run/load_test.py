import dataclasses
import functools
import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging
from ml_collections import ConfigDict

import resnet_flax
from resnet_flax import data, train
from resnet_flax.data import dataset as dataset_lib
from resnet_flax.parallel import evaluate
from resnet_flax.run import checkpoint, errors, load, metrics, mirror
from tests.helpers import (
  Programs,
  assert_identical,
  initial,
  layout_of,
  untimed,
)


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
    scores = load.evaluate_workdir(workdir, which, devices=devices)
    assert scores["epoch"] == record["epoch"]
    assert scores["accuracy"] == record["test_accuracy"]
    assert scores["loss"] == pytest.approx(record["test_loss"], rel=1e-5)


def test_evaluation_on_the_images_of_training(run):
  config, workdir, _ = run
  scores = load.evaluate_workdir(workdir, "latest", split="train")
  images, labels = data.load(config.dataset).train.take(np.arange(64))
  found = load.load_model(workdir, "latest").predict(images)
  likely = found[np.arange(64), labels]
  assert scores["accuracy"] == np.mean(found.argmax(-1) == labels)
  assert scores["loss"] == pytest.approx(-np.log(likely).mean(), rel=1e-5)
  with pytest.raises(errors.ConfigError, match="has test and train"):
    load.evaluate_workdir(workdir, split="val")


def test_a_run_is_scored_by_mirror_images_too(run):
  """Also if it was scored otherwise while training."""
  config, workdir, _ = run
  flipped = ConfigDict(config.to_dict())
  flipped.dataset.test_crops = 2
  loaded = load.load_model(workdir, "latest")
  for split in ("test", "train"):
    scores = load.evaluate_workdir(
      workdir, "latest", split=split, config=flipped
    )
    whole = getattr(data.load(config.dataset), split)
    images, labels = whole.take(np.arange(len(whole)))
    both = [loaded.predict(x) for x in (images, images[:, :, ::-1])]
    mean = np.mean(both, axis=0)
    likely = mean[np.arange(len(labels)), labels]
    assert scores["accuracy"] == np.mean(mean.argmax(-1) == labels)
    assert scores["loss"] == pytest.approx(-np.log(likely).mean(), rel=1e-5)


@pytest.mark.slow
def test_a_run_with_mirror_images_is_trained_as_without(run, tmp_path):
  config, _, records = run
  flipped = ConfigDict(config.to_dict())
  flipped.dataset.test_crops = 2
  found = train.train_and_evaluate(flipped, tmp_path, devices=jax.devices()[:1])
  for one, other in zip(found, records, strict=True):
    assert one["train_loss"] == other["train_loss"]
    assert one["test_loss"] != other["test_loss"]
  last = found[-1]
  scores = load.evaluate_workdir(tmp_path, "latest")
  assert scores["loss"] == pytest.approx(last["test_loss"], rel=1e-5)
  # What `compare` and the report show is the same.
  predictions = load.predict_test(tmp_path, 0, "latest", opened={})
  correct = predictions.probabilities.argmax(-1) == predictions.labels
  assert correct.mean() == last["test_accuracy"]


def test_all_views_of_images_count_as_a_batch(run, monkeypatch):
  _, workdir, _ = run
  loaded, sizes = load.load_model(workdir), []

  def predict(images):
    sizes.append(len(images))
    return loaded.predict(images)

  config = ConfigDict(loaded.config.to_dict())
  config.dataset.test_crops = 2
  seen = dataclasses.replace(loaded, predict=predict, config=config)
  monkeypatch.setattr(load, "load_model", lambda *_, **__: seen)
  load.predict_test(workdir, 0, opened={})
  assert max(sizes) == config.eval_batch_size == 100


def test_a_seed_does_not_need_the_checkpoints_of_others(
  tiny_config, tmp_path, monkeypatch, one_device
):
  tiny_config.num_seeds = 2
  train.train_and_evaluate(tiny_config, tmp_path, devices=one_device)
  # Each has its own best epoch.
  best = [{"step": 4}, {"step": 8}]
  monkeypatch.setattr(metrics, "best_records", lambda *_: best)
  (tmp_path / "checkpoints" / "8" / "manifest.json").unlink()
  assert load.load_model(tmp_path).step == 4
  with pytest.raises(errors.WorkdirError, match="8 is damaged"):
    load.load_model(tmp_path, seed=1)
  with pytest.raises(errors.WorkdirError, match="8 is damaged"):
    load.evaluate_workdir(tmp_path)


def test_evaluation_leaves_the_workdir_alone(run):
  """The workdir may belong to a run that goes on."""
  _, workdir, _ = run
  unfinished = workdir / "checkpoints" / "99.orbax-checkpoint-tmp"
  unfinished.mkdir()
  load.evaluate_workdir(workdir, devices=jax.devices()[:1])
  assert unfinished.exists()
  unfinished.rmdir()


def test_evaluation_may_look_for_the_data_elsewhere(run):
  config, workdir, records = run
  moved = ConfigDict(config.to_dict())
  moved.eval_batch_size = 7
  moved.model.scan = True
  devices = jax.devices()[:1]
  scores = load.evaluate_workdir(
    workdir, "latest", config=moved, devices=devices
  )
  assert scores["accuracy"] == records[-1]["test_accuracy"]
  moved.seed = 5
  with pytest.raises(errors.WorkdirError, match="seed"):
    load.evaluate_workdir(workdir, config=moved, devices=devices)


def test_evaluation_on_other_data_is_refused(run, tmp_path, caplog):
  """On the same pixels in another order of classes, for example."""
  workdir = tmp_path / "run"
  shutil.copytree(run[1], workdir)
  path = workdir / "environment.json"
  environment = json.loads(path.read_text())
  path.write_text(json.dumps(environment | {"data": "digits-1"}))
  score = functools.partial(
    load.evaluate_workdir, workdir, devices=jax.devices()[:1]
  )
  with pytest.raises(errors.WorkdirError, match="digits-1 there, digits here"):
    score()
  assert "does not name" not in caplog.text
  # Where it is not known, that is said.
  path.unlink()
  score()
  assert "does not name the run's training data" in caplog.text


def test_load_model_predicts(run):
  config, workdir, records = run
  loaded = resnet_flax.load_model(workdir)
  images, labels = data.load(config.dataset).test.take(np.arange(360))
  probabilities = loaded.predict(images)
  assert probabilities.shape == (360, 10)
  assert probabilities.dtype == np.float32
  np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
  accuracy = np.mean(probabilities.argmax(-1) == labels)
  best = metrics.best_record(records, "accuracy")
  assert accuracy == pytest.approx(best["test_accuracy"])
  assert loaded.step == best["step"]
  assert loaded.predict(images[:0]).shape == (0, 10)
  logits = jax.eval_shape(
    functools.partial(loaded.model.apply, train=False),
    loaded.variables,
    jnp.zeros((1, 32, 32, 3)),
  )
  assert logits.shape == (1, 10)


def test_predict_can_be_traced(run):
  loaded = resnet_flax.load_model(run[1])
  images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
  np.testing.assert_allclose(
    jax.jit(lambda x: 2 * loaded.predict(x))(images),
    2 * loaded.predict(images),
    rtol=1e-5,
  )
  with pytest.raises(ValueError, match="uint8 images"):
    jax.jit(loaded.predict)(images.astype(np.float32))


def test_changed_variables_change_no_prediction(run):
  loaded, images = resnet_flax.load_model(run[1]), np.ones((1, 32, 32, 3), "u1")
  before = loaded.predict(images)
  head = loaded.variables["params"]["head"]
  head["bias"] = head["bias"] + jnp.arange(10)
  del loaded.variables["batch_stats"]
  np.testing.assert_array_equal(loaded.predict(images), before)


def test_predict_says_that_a_forked_process_would_hang(run, monkeypatch):
  loaded = resnet_flax.load_model(run[1])
  monkeypatch.setattr(os, "getpid", lambda: -1)
  with pytest.raises(RuntimeError, match=r"os\.fork\(\)"):
    loaded.predict(np.zeros((1, 32, 32, 3), np.uint8))


def test_strict_promotion_changes_no_score(run):
  with jax.numpy_dtype_promotion("strict"):
    strict = load.evaluate_workdir(run[1])
  assert strict == load.evaluate_workdir(run[1])


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


def test_data_that_a_workdir_leads_to_is_named(run, tmp_path, caplog):
  """Another person's data may hold labels that make its score perfect."""
  _, workdir, _ = run
  load.evaluate_workdir(workdir)
  assert "scored on the data in" not in caplog.text
  other = tmp_path / "run"
  shutil.copytree(workdir, other)
  config = json.loads((other / "config.json").read_text())
  config["dataset"]["cache_dir"] = str(tmp_path / "cache")
  (other / "config.json").write_text(json.dumps(config))
  load.evaluate_workdir(other)
  assert f"dataset.cache_dir={tmp_path / 'cache'}" in caplog.text


def test_class_names_are_those_of_the_data(run):
  loaded = resnet_flax.load_model(run[1])
  assert loaded.class_names == tuple("0123456789")


def test_preprocess_is_what_predict_does_before(run):
  loaded = resnet_flax.load_model(run[1], "latest")
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (5, 32, 32, 3), np.uint8)

  @jax.jit
  def classify(pixels):
    x = loaded.preprocess(pixels)
    logits = loaded.model.apply(loaded.variables, x, train=False)
    return jax.nn.softmax(logits)

  np.testing.assert_allclose(
    classify(pixels), loaded.predict(pixels), rtol=1e-5, atol=1e-6
  )


def test_a_mirror_is_loaded_and_scored_as_its_workdir(run, tmp_path):
  _, workdir, _ = run
  with mirror.Mirror(str(tmp_path / "disk"), workdir):
    pass
  address = tmp_path / "disk"
  assert resnet_flax.load_model(address).step == (
    resnet_flax.load_model(workdir).step
  )
  assert load.evaluate_workdir(address) == (load.evaluate_workdir(workdir))


# ---- The best checkpoint


@pytest.fixture(scope="module")
def falling(make_tiny_config, tmp_path_factory):
  """The workdir of a run that gets worse: it keeps steps 4, 12 and 16."""
  folder = tmp_path_factory.mktemp("falling")
  config = make_tiny_config(folder / "cache")
  config.num_epochs = 4

  def scripted(eval_step, state, *arguments, **keywords):
    accuracy = 0.5 - state.step / 100
    values = {"loss": 1.0, "objective": 1.0, "accuracy": accuracy}
    return evaluate.Scores([values], None)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate, "evaluate", scripted)
    train.train_and_evaluate(config, folder / "run", devices=jax.devices()[:1])
  return folder / "run"


@pytest.fixture
def fallen(falling, tmp_path):
  """A copy of it."""
  shutil.copytree(falling, tmp_path / "fallen")
  return tmp_path / "fallen"


@pytest.mark.parametrize(
  ("gone", "there"),
  [([4], "12, 16"), ([4, 12], "16"), ([4, 12, 16], "none")],
)
def test_a_missing_best_checkpoint_is_no_other_one(fallen, gone, there):
  """A folder that was copied in part, for example, lacks it."""
  for step in gone:
    shutil.rmtree(fallen / "checkpoints" / str(step))
  message = f"no checkpoint of step 4, .*; it has {there}. Copy the"
  with pytest.raises(errors.WorkdirError, match=message):
    load.load_model(fallen)


def test_the_last_record_may_be_ahead_of_its_checkpoint(fallen):
  path = fallen / "metrics.jsonl"
  lines = path.read_text().splitlines()
  lines[-1] = json.dumps(json.loads(lines[-1]) | {"test_accuracy": 0.99})
  path.write_text("\n".join(lines))
  assert load.load_model(fallen).step == 16
  shutil.rmtree(fallen / "checkpoints" / "16")
  assert load.load_model(fallen).step == 4


def test_a_renamed_checkpoint_is_noticed(fallen):
  folders = fallen / "checkpoints"
  (folders / "4").rename(folders / "other")
  (folders / "16").rename(folders / "4")
  (folders / "other").rename(folders / "16")
  for which, step in (("best", 16), ("latest", 4)):
    message = f"its step is {step}; rename it back"
    with pytest.raises(errors.WorkdirError, match=message):
      load.load_model(fallen, which)


def test_a_record_without_its_line_break_counts(fallen):
  path = fallen / "metrics.jsonl"
  lines = path.read_text().splitlines()[:1]
  path.write_text("\n".join(lines))
  assert load.load_model(fallen).step == 4


# ---- A run that goes on


def test_a_checkpoint_that_is_removed_while_it_is_read(fallen, monkeypatch):
  """Another epoch has become the best: it is read instead."""
  restore = checkpoint.restore
  steps = []

  def meanwhile(workdir, step, like):
    if not steps:
      path = fallen / "metrics.jsonl"
      records = [json.loads(line) for line in path.read_text().splitlines()]
      records[2]["test_accuracy"] = 0.99
      path.write_text("".join(json.dumps(each) + "\n" for each in records))
      shutil.rmtree(fallen / "checkpoints" / "4")
    steps.append(step)
    return restore(workdir, step, like)

  monkeypatch.setattr(checkpoint, "restore", meanwhile)
  assert load.load_model(fallen).step == 12
  assert steps == [4, 12]


@pytest.mark.parametrize("changes", [1, 1000])
def test_a_checkpoint_that_is_being_removed(fallen, monkeypatch, changes):
  """It is read again, a few times."""
  restore = checkpoint.restore
  calls = []

  def vanishing(*arguments):
    calls.append(arguments)
    if len(calls) <= changes:
      raise errors.WorkdirError("a file is missing")
    return restore(*arguments)

  monkeypatch.setattr(checkpoint, "restore", vanishing)
  monkeypatch.setattr(time, "sleep", lambda seconds: None)
  if changes == 1:
    assert load.load_model(fallen).step == 4
  else:
    with pytest.raises(errors.WorkdirError, match="a file is missing"):
      load.load_model(fallen)
    assert len(calls) == 5


def test_a_file_is_no_workdir(run):
  with pytest.raises(errors.WorkdirError, match="is not the workdir of a run"):
    resnet_flax.load_model(run[1] / "metrics.jsonl")


def test_a_name_that_no_folder_can_have(tiny_config):
  with pytest.raises(errors.WorkdirError, match="File name too long"):
    resnet_flax.load_model("x" * 300)
  tiny_config.init_from = "x" * 300
  with pytest.raises(errors.WorkdirError, match=r"init_from=.* not a folder"):
    load.load_source(tiny_config)


def test_unknown_checkpoint(run):
  with pytest.raises(errors.ConfigError, match="Did you mean 'latest'"):
    resnet_flax.load_model(run[1], "last")


def test_no_checkpoint_yet(run, tmp_path):
  (tmp_path / "config.json").write_text((run[1] / "config.json").read_text())
  with pytest.raises(errors.WorkdirError, match="has no best checkpoint: "):
    resnet_flax.load_model(tmp_path)


@pytest.mark.parametrize("read", [load.load_model, load.evaluate_workdir])
def test_reading_a_run_warns_of_nothing(run, read, caplog):
  _, workdir, _ = run
  before = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.WARNING)
  logger = absl_logging.get_absl_logger()
  logger.addHandler(caplog.handler)
  try:
    read(workdir)
    assert absl_logging.get_verbosity() == absl_logging.WARNING
  finally:
    logger.removeHandler(caplog.handler)
    absl_logging.set_verbosity(before)
  assert caplog.text == ""


def test_package_lists_what_it_has():
  assert "load_model" in dir(resnet_flax)


def test_package_has_nothing_else():
  with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
    _ = resnet_flax.load_modle


# ---- Runs that start from another run's weights


@pytest.fixture(scope="module")
def programs():
  return Programs()


@pytest.fixture(scope="module")
def source(make_tiny_config, tmp_path_factory, programs):
  """The workdir of a finished tiny run."""
  folder = tmp_path_factory.mktemp("source")
  config = make_tiny_config(folder / "cache")
  config.num_epochs = 1
  programs.train(config, folder / "run", devices=jax.devices()[:1])
  return folder / "run"


def start_from(source, config, **model):
  """The state as drawn, and the one that a run of this configuration has."""
  config.init_from = str(source)
  config.model.update(model)
  layout = layout_of(config)
  experiment, split, drawn, _ = initial(config, layout)
  state = train.initial_state(
    config, experiment, split, layout, load.load_source(config)
  )
  return *layout.get(drawn), *layout.get(state)


def test_takes_parameters_and_statistics(source, tiny_config):
  drawn, state = start_from(source, tiny_config)
  trained = load.load_model(source)
  assert_identical(state.params, trained.variables["params"])
  assert_identical(state.batch_stats, trained.variables["batch_stats"])
  # Nothing else: neither the step nor moments nor the normalisation.
  assert_identical(
    state.replace(params={}, batch_stats={}),
    drawn.replace(params={}, batch_stats={}),
  )


def test_an_optimizer_that_keeps_the_first_weights_has_them(
  source, tiny_config
):
  tiny_config.init_from = str(source)
  tiny_config.optimizer.update({"name": "optax/dog", "l2": 0.0})
  experiment, split, _, _ = initial(tiny_config, layout_of(tiny_config))
  (state,) = layout_of(tiny_config).get(
    train.initial_state(
      *(tiny_config, experiment, split, layout_of(tiny_config)),
      load.load_source(tiny_config),
    )
  )
  trained = load.load_model(source).variables["params"]
  assert_identical(state.params, trained)
  kept = optax.tree.get(state.opt_state, "init_params")
  assert_identical(kept, trained)


def test_other_classes_get_a_new_head(source, tiny_config):
  drawn, state = start_from(source, tiny_config, num_classes=7)
  trained = load.load_model(source).variables["params"]
  assert_identical(state.params["head"], drawn.params["head"])
  assert state.params["head"]["bias"].shape == (7,)
  assert_identical(state.params["stem_conv"], trained["stem_conv"])


def test_as_many_classes_of_another_data_set_get_a_new_head(
  source, tiny_config, monkeypatch
):
  known = dataset_lib.DATASETS
  monkeypatch.setitem(known, "mine", known["digits"])
  tiny_config.dataset.name = "mine"
  drawn, state = start_from(source, tiny_config)
  trained = load.load_model(source).variables["params"]
  assert trained["head"]["bias"].shape == drawn.params["head"]["bias"].shape
  assert_identical(state.params["head"], drawn.params["head"])
  assert_identical(state.params["stem_conv"], trained["stem_conv"])


def test_trains_from_there(source, tiny_config, tmp_path):
  tiny_config.init_from = str(source)
  tiny_config.num_epochs = 1
  # So small that the result is where it started.
  tiny_config.optimizer.learning_rate = 1e-30
  tiny_config.model.batch_norm_momentum = 0.999999
  workdir = tmp_path / "run"
  one = jax.devices()[:1]
  (record,) = train.train_and_evaluate(tiny_config, workdir, devices=one)
  scores = load.evaluate_workdir(source, devices=one)
  assert record["test_loss"] == pytest.approx(scores["loss"], rel=1e-3)


@pytest.mark.parametrize(
  ("model", "message"),
  [
    ({"padding": "symmetric"}, r"padding \('same' there, 'symmetric' here\)"),
    ({"shortcut": "A"}, r"shortcut \('keras' there, 'A' here\)"),
    ({"num_filters": 6}, r"num_filters \(4 there, 6 here\)"),
    ({"depth": 14}, r"depth \(8 there, 14 here\)"),
  ],
)
def test_another_network_is_refused(source, tiny_config, model, message):
  tiny_config.init_from = str(source)
  tiny_config.model.update(model)
  with pytest.raises(errors.ConfigError, match=message):
    load.load_source(tiny_config)


def test_what_does_not_change_the_function_may_differ(source, tiny_config):
  tiny_config.init_from = str(source)
  tiny_config.model.update({"shortcut": "keras", "remat": True})
  load.load_source(tiny_config)


def test_run_does_not_depend_on_what_becomes_of_its_source(
  source, tiny_config, tmp_path, one_device, programs
):
  """It starts with a checkpoint, from which it resumes if interrupted."""
  copy, workdir = tmp_path / "source", tmp_path / "run"
  shutil.copytree(source, copy)
  tiny_config.init_from = str(copy)
  tiny_config.num_epochs = 1
  records = programs.train(tiny_config, workdir, devices=one_device)
  # As if it had been killed before the next checkpoint.
  (workdir / "metrics.jsonl").unlink()
  shutil.rmtree(workdir / "checkpoints" / "4")
  shutil.rmtree(copy)
  again = programs.train(tiny_config, workdir, devices=one_device)
  assert untimed(again) == untimed(records)


def test_folder_without_a_run(tiny_config, tmp_path):
  tiny_config.init_from = str(tmp_path)
  with pytest.raises(errors.WorkdirError, match=r"init_from=.*not the workdir"):
    load.load_source(tiny_config)


def test_no_run_there(tiny_config, tmp_path):
  tiny_config.init_from = str(tmp_path / "nothing")
  workdir = tmp_path / "run"
  with pytest.raises(
    errors.WorkdirError, match=r"init_from=.* is not a folder"
  ):
    train.train_and_evaluate(tiny_config, workdir)
  assert not workdir.exists()


def test_another_normalization_is_warned_about(source, tiny_config, caplog):
  tiny_config.init_from = str(source)
  tiny_config.normalization = "channel"
  load.load_source(tiny_config)
  assert "normalization=channel" in caplog.text
