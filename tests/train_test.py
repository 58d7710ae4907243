import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from resnet_flax import (
  checkpoint,
  datasets,
  errors,
  evaluate,
  experiment as experiment_lib,
  mesh as mesh_lib,
  metrics,
  randomness,
  train,
)

TIMING = ("epoch_seconds", "images_per_second")


def untimed(records):
  return [
    {key: value for key, value in record.items() if key not in TIMING}
    for record in records
  ]


def final_state(config, workdir, devices):
  """The latest checkpoint of a run, as a tree of arrays."""
  experiment = experiment_lib.build(config)
  mesh = mesh_lib.create_mesh(devices)
  dataset = datasets.load(config.dataset)
  like = train.initial_state(config, experiment, dataset.train, mesh)
  with checkpoint.Checkpoints(workdir) as checkpoints:
    return checkpoints.restore(checkpoints.latest_step(), like, mesh)


def assert_identical(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def interrupt_at(monkeypatch, step):
  """Presses Ctrl-C when the given step of this process has been read."""
  calls = itertools.count(1)

  def read(*arguments):
    if next(calls) == step:
      raise KeyboardInterrupt
    return original(*arguments)

  original = train._read
  monkeypatch.setattr(train, "_read", read)


def test_a_run_leaves_its_numbers(tiny_config, tmp_path, one_device):
  tiny_config.log.tensorboard = True
  workdir = tmp_path / "a run with spaces é"
  records = train.train_and_evaluate(tiny_config, workdir, devices=one_device)
  assert [record["epoch"] for record in records] == [0, 1]
  assert [record["step"] for record in records] == [4, 8]
  assert list(records[0]) == [
    "epoch",
    "step",
    "learning_rate",
    "train_loss",
    "train_objective",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "epoch_seconds",
    "images_per_second",
  ]
  assert records[0]["train_objective"] > records[0]["train_loss"]
  assert records == metrics.MetricsLog(workdir).read()
  stored = json.loads((workdir / "config.json").read_text())
  assert (
    ConfigDict(stored).to_json()
    == ConfigDict(json.loads(json.dumps(tiny_config.to_dict()))).to_json()
  )
  assert list((workdir / "tensorboard").iterdir())


def test_interrupted_run_goes_on_to_the_same_bits(
  tiny_config, tmp_path, monkeypatch, one_device
):
  tiny_config.num_epochs = 3
  tiny_config.plateau.enabled = True
  run = functools.partial(train.train_and_evaluate, devices=one_device)
  straight = run(tiny_config, tmp_path / "straight")
  with monkeypatch.context() as patch:
    interrupt_at(patch, step=6)
    with pytest.raises(errors.Interrupted, match=r"1 of 3 epochs are saved"):
      run(tiny_config, tmp_path / "broken")
  assert len(metrics.MetricsLog(tmp_path / "broken").read()) == 1
  continued = run(tiny_config, tmp_path / "broken")
  assert untimed(continued) == untimed(straight)
  assert_identical(
    final_state(tiny_config, tmp_path / "broken", one_device),
    final_state(tiny_config, tmp_path / "straight", one_device),
  )


def test_record_without_its_checkpoint_is_cut_off(
  tiny_config, tmp_path, monkeypatch, one_device
):
  """As after a kill between the two."""
  run = functools.partial(train.train_and_evaluate, devices=one_device)
  straight = run(tiny_config, tmp_path / "straight")
  with monkeypatch.context() as patch:
    interrupt_at(patch, step=6)
    with pytest.raises(errors.Interrupted):
      run(tiny_config, tmp_path / "broken")
  log = metrics.MetricsLog(tmp_path / "broken")
  log.append({**log.read()[0], "epoch": 1})
  assert untimed(run(tiny_config, tmp_path / "broken")) == untimed(straight)
  assert untimed(log.read()) == untimed(straight)


def test_finished_run_is_not_trained_again(
  tiny_config, tmp_path, monkeypatch, one_device
):
  tiny_config.num_epochs = 1
  run = functools.partial(train.train_and_evaluate, devices=one_device)
  records = run(tiny_config, tmp_path / "run")
  monkeypatch.setattr(datasets, "load", None)
  assert run(tiny_config, tmp_path / "run") == records


def test_validation_chooses_the_best_epoch(
  tiny_config, tmp_path, monkeypatch, one_device
):
  tiny_config.dataset.validation_examples = 50
  sizes = []

  def opposite(eval_step, state, split, *arguments, **keywords):
    """Validation gets worse with every epoch, test better."""
    sizes.append(len(split))
    sign = -1 if len(split) == 50 else 1
    accuracy = 0.5 + sign * int(state.step) / 100
    return {"loss": 1.0, "objective": 1.0, "accuracy": accuracy}

  monkeypatch.setattr(evaluate, "evaluate", opposite)
  records = train.train_and_evaluate(
    tiny_config, tmp_path / "run", devices=one_device
  )
  assert sizes == [50, 360] * 2
  assert {"val_loss", "val_accuracy"} < set(records[0])
  assert metrics.best_record(records)["epoch"] == 0
  with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
    assert checkpoints.best_step() == 4
    assert checkpoints.latest_step() == 8


def test_non_finite_evaluation_stops_and_is_never_saved(
  tiny_config, tmp_path, monkeypatch, one_device
):
  scores = {"loss": float("nan"), "objective": float("nan"), "accuracy": 0.1}
  monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: scores)
  with pytest.raises(
    errors.NonFiniteError, match="test loss is nan after step"
  ):
    train.train_and_evaluate(tiny_config, tmp_path / "run", devices=one_device)
  assert metrics.MetricsLog(tmp_path / "run").read() == []


def test_non_finite_loss_stops_and_is_never_saved(
  tiny_config, tmp_path, one_device
):
  tiny_config.optimizer.name = "sgd"
  tiny_config.optimizer.learning_rate = 1e30
  with pytest.raises(errors.NonFiniteError, match=r"after step \d .* 1e\+30"):
    train.train_and_evaluate(tiny_config, tmp_path / "run", devices=one_device)
  with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
    assert checkpoints.latest_step() is None
  assert metrics.MetricsLog(tmp_path / "run").read() == []


def test_full_disk_is_one_line_and_keeps_what_was_saved(
  tiny_config, tmp_path, monkeypatch, one_device
):
  run = functools.partial(train.train_and_evaluate, devices=one_device)
  append = metrics.MetricsLog.append

  def failing(self, record):
    if record["epoch"] == 1:
      raise OSError(28, "No space left on device")
    append(self, record)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.MetricsLog, "append", failing)
    with pytest.raises(errors.WorkdirError, match="no space left on the disk"):
      run(tiny_config, tmp_path / "run")
  assert len(run(tiny_config, tmp_path / "run")) == 2


def test_other_errors_are_not_disguised(
  tiny_config, tmp_path, monkeypatch, one_device
):
  def broken(self, record):
    raise RuntimeError("a mistake in the program")

  monkeypatch.setattr(metrics.MetricsLog, "append", broken)
  with pytest.raises(RuntimeError, match="a mistake in the program"):
    train.train_and_evaluate(tiny_config, tmp_path / "run", devices=one_device)


@pytest.fixture
def dataset(tiny_config):
  return datasets.load(tiny_config.dataset)


def losses_of(config, dataset, devices, steps):
  """The loss of each of the first steps."""
  experiment = experiment_lib.build(config)
  mesh = mesh_lib.create_mesh(devices)
  state = train.initial_state(config, experiment, dataset.train, mesh)
  key = jax.device_put(
    randomness.device_key(0, randomness.Purpose.AUGMENTATION),
    mesh_lib.replicated(mesh),
  )
  compiled = train.compile_train_step(
    experiment, state, config.batch_size, key, mesh
  )
  sums = [0.0]
  batches = itertools.chain.from_iterable(
    train.epoch_batches(dataset.train, config.batch_size, 0, epoch, mesh)
    for epoch in itertools.count()
  )
  for images, labels in itertools.islice(batches, steps):
    state, step_metrics = compiled(state, images, labels, key)
    sums.append(float(step_metrics.sums.loss))
  return np.diff(sums) / config.batch_size


@pytest.mark.parametrize("num_devices", [2, 8])
def test_many_devices_compute_what_one_does(tiny_config, num_devices):
  tiny_config.batch_size = 16
  tiny_config.dataset.train_examples = 80
  dataset = datasets.load(tiny_config.dataset)
  one = losses_of(tiny_config, dataset, jax.devices()[:1], steps=5)
  many = losses_of(tiny_config, dataset, jax.devices()[:num_devices], steps=5)
  np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
  np.testing.assert_allclose(many, one, rtol=1e-4)


def test_bfloat16_learns_with_float32_parameters(
  tiny_config, tmp_path, one_device
):
  tiny_config.model.dtype = "bfloat16"
  tiny_config.num_epochs = 4
  records = train.train_and_evaluate(
    tiny_config, tmp_path / "run", devices=one_device
  )
  assert records[-1]["train_loss"] < records[0]["train_loss"]
  state = final_state(tiny_config, tmp_path / "run", one_device)
  for leaf in jax.tree.leaves((state.params, state.batch_stats)):
    assert leaf.dtype == jnp.float32


def test_epoch_batches(dataset):
  mesh = mesh_lib.create_mesh(jax.devices()[:1])

  def labels_and_images(seed, epoch, batch_size=5):
    batches = train.epoch_batches(dataset.train, batch_size, seed, epoch, mesh)
    return [(np.asarray(x).tobytes(), list(np.asarray(y))) for x, y in batches]

  first = labels_and_images(seed=0, epoch=0)
  # 32 images make 6 batches of 5; the last two images are dropped.
  assert len(first) == 6
  assert labels_and_images(seed=0, epoch=0) == first
  assert labels_and_images(seed=0, epoch=1) != first
  assert labels_and_images(seed=1, epoch=0) != first
  (whole,) = labels_and_images(seed=0, epoch=0, batch_size=32)
  assert sorted(whole[1]) == sorted(dataset.train.take(np.arange(32))[1])


class Finite:
  """A step's metrics that say which step they are of."""

  def __init__(self, step):
    self.step, self.finite = step, True


def test_metrics_are_read_one_step_late():
  events = []
  batches = [(k, k) for k in range(3)]

  class State:
    step = 0

  def step_fn(state, images, labels, key):
    events.append(f"dispatch {images}")
    return state, Finite(images)

  train.train_epoch(
    step_fn,
    State(),
    batches,
    None,
    lambda step_metrics: events.append(f"read {step_metrics.step}"),
  )
  assert events == [
    "dispatch 0",
    "dispatch 1",
    "read 0",
    "dispatch 2",
    "read 1",
    "read 2",
  ]


def test_donated_state_does_not_reach_a_checkpoint(
  tiny_config, tmp_path, one_device, dataset
):
  """Saving is asynchronous, and the next step takes the buffers over."""
  experiment = experiment_lib.build(tiny_config)
  mesh = mesh_lib.create_mesh(one_device)
  state = train.initial_state(tiny_config, experiment, dataset.train, mesh)
  key = jax.device_put(jax.random.key(0), mesh_lib.replicated(mesh))
  compiled = train.compile_train_step(experiment, state, 8, key, mesh)
  (batch, *_) = train.epoch_batches(dataset.train, 8, 0, 0, mesh)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for epoch in range(5):
      state, _ = compiled(state, *batch, key)
      copy = jax.tree.map(lambda x: np.array(x, copy=True), state)
      checkpoints.save(state, epoch=epoch, accuracy=0.0)
      for _ in range(3):
        state, _ = compiled(state, *batch, key)
      checkpoints.wait()
      step = int(copy.step)
      assert_identical(checkpoints.restore(step, state, mesh), copy)
