"""Fine-tuning: runs that start from another run's weights."""

import shutil

import jax
import numpy as np
import pytest

from resnet_flax import train
from resnet_flax.run import errors, load as inference, metrics, transfer


@pytest.fixture(scope="module")
def source(make_tiny_config, tmp_path_factory):
  """The workdir of a finished tiny run."""
  folder = tmp_path_factory.mktemp("source")
  config = make_tiny_config(folder / "cache")
  config.num_epochs = 1
  train.train_and_evaluate(config, folder / "run", devices=jax.devices()[:1])
  return folder / "run"


def start_from(source, config, **model):
  """The state as drawn, and the one that a run of this configuration has."""
  config.init_from = str(source)
  config.model.update(model)
  experiment = train.experiment_lib.build(config)
  layout = train.seeds_lib.Layout.create(config, jax.devices()[:1])
  dataset = train.datasets.load(config.dataset)
  state = train.initial_state(config, experiment, dataset.train, layout)
  return state, transfer.initialize(state, transfer.load(config))


def assert_same(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_takes_parameters_and_statistics(source, tiny_config):
  drawn, state = start_from(source, tiny_config)
  trained = inference.load_model(source)
  assert_same(state.params, trained.variables["params"])
  assert_same(state.batch_stats, trained.variables["batch_stats"])
  # Nothing else: neither the step nor moments nor the normalisation.
  assert_same(
    state.replace(params={}, batch_stats={}),
    drawn.replace(params={}, batch_stats={}),
  )


def test_other_classes_get_a_new_head(source, tiny_config):
  drawn, state = start_from(source, tiny_config, num_classes=7)
  trained = inference.load_model(source).variables["params"]
  assert_same(state.params["head"], drawn.params["head"])
  assert state.params["head"]["bias"].shape == (7,)
  assert_same(state.params["stem_conv"], trained["stem_conv"])


def test_trains_from_there(source, tiny_config, tmp_path):
  tiny_config.init_from = str(source)
  tiny_config.num_epochs = 1
  # So small that the result is where it started.
  tiny_config.optimizer.learning_rate = 1e-30
  tiny_config.model.batch_norm_momentum = 0.999999
  workdir = tmp_path / "run"
  one = jax.devices()[:1]
  (record,) = train.train_and_evaluate(tiny_config, workdir, devices=one)
  scores = inference.evaluate_workdir(source, devices=one)
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
    transfer.load(tiny_config)


def test_what_does_not_change_the_function_may_differ(source, tiny_config):
  tiny_config.init_from = str(source)
  tiny_config.model.update({"shortcut": "keras", "remat": True})
  transfer.load(tiny_config)


def test_run_does_not_depend_on_what_becomes_of_its_source(
  source, tiny_config, tmp_path, one_device
):
  """It starts with a checkpoint, from which an interrupted one goes on."""
  tiny_config.num_epochs = 1
  copy, workdir = tmp_path / "source", tmp_path / "run"
  shutil.copytree(source, copy)
  tiny_config.init_from = str(copy)
  records = train.train_and_evaluate(tiny_config, workdir, devices=one_device)
  # As if it had been killed before the next checkpoint.
  (workdir / "metrics.jsonl").unlink()
  shutil.rmtree(workdir / "checkpoints" / "4")
  shutil.rmtree(copy)
  again = train.train_and_evaluate(tiny_config, workdir, devices=one_device)
  assert metrics.untimed(again) == metrics.untimed(records)


def test_folder_without_a_run(tiny_config, tmp_path):
  tiny_config.init_from = str(tmp_path)
  with pytest.raises(errors.WorkdirError, match=r"init_from=.*not the workdir"):
    transfer.load(tiny_config)


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
  transfer.load(tiny_config)
  assert "normalization=channel" in caplog.text
