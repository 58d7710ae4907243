import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import (
  data as datasets,
  experiment as experiment_lib,
  step as train_step,
  train,
)
from resnet_flax.parallel import (
  calls as calls_lib,
  epochs,
  evaluate,
  mesh as mesh_lib,
  networks as seeds,
)
from resnet_flax.run import checkpoint, errors, metrics, progress


def restore(config, workdir, step=None):
  """A checkpoint of a run, by default the latest, as a tree of arrays."""
  experiment = experiment_lib.build(config)
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    state, _ = checkpoints.restore(
      step or checkpoints.steps()[-1],
      experiment_lib.abstract_state(config, experiment),
    )
  return state


def saved_steps(workdir):
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    return checkpoints.steps()


def assert_identical(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_same_run(config, one, other):
  """Checkpoints and records are the same, to the bit."""
  assert metrics.untimed(metrics.MetricsLog(one).read()) == metrics.untimed(
    metrics.MetricsLog(other).read()
  )
  assert saved_steps(one)[-1] == saved_steps(other)[-1]
  for step in {saved_steps(one)[-1], best_step(one)}:
    assert_identical(restore(config, one, step), restore(config, other, step))


def best_step(workdir):
  records = metrics.MetricsLog(workdir).read()
  return metrics.best_record(records, "accuracy")["step"]


def die_at(monkeypatch, module, name, call):
  """As a kill would: an exception that nobody expects, at the given call."""
  calls = itertools.count(1)
  original = getattr(module, name)

  def dying(*arguments, **keywords):
    if next(calls) == call:
      raise SystemExit
    return original(*arguments, **keywords)

  monkeypatch.setattr(module, name, dying)


def signal_at_step(monkeypatch, number, step):
  """A signal comes after the given step of this process has been read."""
  calls = itertools.count(1)
  original = calls_lib._read

  def read(*arguments):
    if next(calls) == step:
      os.kill(os.getpid(), number)
    return original(*arguments)

  monkeypatch.setattr(calls_lib, "_read", read)


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
    "test_objective",
    "test_accuracy",
    "epoch_seconds",
    "images_per_second",
  ]
  assert records[0]["train_objective"] > records[0]["train_loss"]
  assert records == metrics.MetricsLog(workdir).read()
  stored = json.loads((workdir / "config.json").read_text())
  # As chosen on a CPU.
  assert stored.pop("steps_per_call") == 1
  expected = json.loads(json.dumps(tiny_config.to_dict()))
  assert expected.pop("steps_per_call") == 0
  assert stored == expected
  assert list((workdir / "tensorboard").iterdir())


@pytest.fixture(scope="module")
def long_config(make_tiny_config, tmp_path_factory):
  """3 epochs of 4 steps, with everything that a state can hold."""
  config = make_tiny_config(tmp_path_factory.mktemp("cache"))
  config.num_epochs = 3
  config.schedule.warmup_learning_rate = 1e-4
  config.schedule.warmup_min_depth = 8
  config.plateau.enabled = True
  config.checkpoint.every_steps = 3
  return config


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
  """Runs of `long_config` take hundreds of steps, compiled once a mesh."""
  programs = {}

  def remember(function, key):
    def remembering(*arguments):
      experiment = arguments[0]
      if experiment.learning_rate.steps_per_epoch != 4 or not (
        experiment.learning_rate.warmup
      ):
        return function(*arguments)
      name = (function, key(*arguments))
      if name not in programs:
        programs[name] = function(*arguments)
      return programs[name]

    return remembering

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      calls_lib,
      "compile_train_step",
      remember(calls_lib.compile_train_step, lambda *arguments: arguments[-1]),
    )
    patch.setattr(
      evaluate,
      "jit_eval_step",
      remember(evaluate.jit_eval_step, lambda *arguments: arguments[-1]),
    )
    yield


@pytest.fixture(scope="module")
def straight(long_config, tmp_path_factory):
  """The workdir of the uninterrupted run."""
  workdir = tmp_path_factory.mktemp("straight")
  train.train_and_evaluate(long_config, workdir, devices=jax.devices()[:1])
  return workdir


@pytest.mark.parametrize(
  ("number", "code", "at", "saved"),
  [
    # Read one step late: the next one is under way, finished and saved.
    (signal.SIGINT, 130, 1, 2),
    (signal.SIGTERM, 143, 1, 2),
    (signal.SIGTERM, 143, 2, 3),
    # Saved and read at once, at the end of an epoch and within one.
    (signal.SIGTERM, 143, 4, 4),
    (signal.SIGTERM, 143, 6, 6),
    (signal.SIGTERM, 143, 11, 12),
  ],
)
@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(
  straight,
  long_config,
  tmp_path,
  monkeypatch,
  one_device,
  number,
  code,
  at,
  saved,
):
  run = functools.partial(train.train_and_evaluate, devices=one_device)
  with monkeypatch.context() as patch:
    signal_at_step(patch, number, at)
    with pytest.raises(errors.Interrupted) as caught:
      run(long_config, tmp_path)
  assert caught.value.exit_code == code
  assert f"stopped by {signal.Signals(number).name}" in str(caught.value)
  assert f"saved up to step {saved} in" in str(caught.value)
  assert saved_steps(tmp_path)[-1] == saved
  run(long_config, tmp_path)
  assert_same_run(long_config, tmp_path, straight)


@pytest.mark.parametrize(
  ("module", "name", "call"),
  [
    (calls_lib, "_read", 1),
    (calls_lib, "_read", 6),
    (calls_lib, "_read", 12),
    (evaluate._Totals, "add", 1),
    (evaluate._Totals, "add", 6),
    (train, "_record", 2),
    (metrics.MetricsLog, "append", 1),
    (metrics.MetricsLog, "append", 3),
    (checkpoint.Checkpoints, "save", 1),
    (checkpoint.Checkpoints, "save", 5),
    (checkpoint.Checkpoints, "_write_manifest", 3),
    (metrics.TensorBoard, "write", 1),
    (metrics.TensorBoard, "write", 3),
    (progress.Progress, "end_epoch", 2),
  ],
)
def test_a_run_that_died_goes_on_to_the_same_bits(
  long_config, straight, tmp_path, monkeypatch, one_device, module, name, call
):
  run = functools.partial(train.train_and_evaluate, devices=one_device)
  with monkeypatch.context() as patch:
    die_at(patch, module, name, call)
    with pytest.raises((SystemExit, errors.WorkdirError)):
      run(long_config, tmp_path)
  run(long_config, tmp_path)
  assert_same_run(long_config, tmp_path, straight)


def test_record_without_its_checkpoint_is_cut_off(
  long_config, straight, tmp_path, monkeypatch, one_device
):
  """As after a kill while the checkpoint was on its way to the disk."""
  run = functools.partial(train.train_and_evaluate, devices=one_device)
  with monkeypatch.context() as patch:
    die_at(patch, calls_lib, "_read", 6)
    with pytest.raises(SystemExit):
      run(long_config, tmp_path)
  log = metrics.MetricsLog(tmp_path)
  log.append({**log.read()[0], "epoch": 1})
  run(long_config, tmp_path)
  assert_same_run(long_config, tmp_path, straight)


@pytest.mark.parametrize("damaged", [1, 2])
def test_damaged_checkpoints_are_trained_again_to_the_same_bits(
  long_config, straight, tmp_path, one_device, damaged, caplog
):
  workdir = tmp_path / "run"
  shutil.copytree(straight, workdir)
  steps = saved_steps(workdir)
  for step in steps[-damaged:]:
    folder = workdir / f"checkpoints/{step}/state"
    path = max(
      (path for path in folder.rglob("*") if path.is_file()),
      key=lambda path: path.stat().st_size,
    )
    path.write_bytes(path.read_bytes()[:-1])
  if damaged == len(steps):
    with pytest.raises(errors.WorkdirError, match="is good"):
      train.train_and_evaluate(long_config, workdir, devices=one_device)
    return
  train.train_and_evaluate(long_config, workdir, devices=one_device)
  assert "is damaged" in caplog.text
  assert_same_run(long_config, workdir, straight)


@pytest.mark.parametrize(("first", "then"), [(1, 8), (8, 1)])
def test_a_run_goes_on_with_other_devices(
  long_config, straight, tmp_path, monkeypatch, first, then
):
  run = functools.partial(train.train_and_evaluate, long_config, tmp_path)
  with monkeypatch.context() as patch:
    die_at(patch, calls_lib, "_read", 6)
    with pytest.raises(SystemExit):
      run(devices=jax.devices()[:first])
  records = run(devices=jax.devices()[:then])
  expected = metrics.MetricsLog(straight).read()
  for record, reference in zip(records, expected, strict=True):
    # Sums over devices are rounded in another order.
    assert record["train_loss"] == pytest.approx(
      reference["train_loss"], rel=1e-3
    )


def test_a_clock_that_is_set_back_does_not_matter(
  long_config, straight, tmp_path, monkeypatch, one_device
):
  times = itertools.count(2e9, -3600)
  monkeypatch.setattr(time, "time", lambda: next(times))
  run = functools.partial(train.train_and_evaluate, devices=one_device)
  with monkeypatch.context() as patch:
    die_at(patch, calls_lib, "_read", 6)
    with pytest.raises(SystemExit):
      run(long_config, tmp_path)
  run(long_config, tmp_path)
  assert_same_run(long_config, tmp_path, straight)


def test_checkpoints_by_the_clock(tiny_config, tmp_path, one_device):
  tiny_config.checkpoint.every_minutes = 1e-9
  with pytest.MonkeyPatch.context() as patch:
    die_at(patch, calls_lib, "_read", 3)
    with pytest.raises(SystemExit):
      train.train_and_evaluate(tiny_config, tmp_path, devices=one_device)
  assert saved_steps(tmp_path) == [1, 2]


def test_a_second_run_in_the_same_workdir_is_refused(
  tiny_config, tmp_path, monkeypatch, one_device
):
  run = functools.partial(train.train_and_evaluate, tiny_config, tmp_path)
  seen = []

  def other(*arguments):
    with pytest.raises(errors.WorkdirError, match="in use by process") as error:
      run(devices=one_device)
    seen.append(error)
    return original(*arguments)

  original = calls_lib._read
  with monkeypatch.context() as patch:
    patch.setattr(calls_lib, "_read", other)
    run(devices=one_device)
  assert len(seen) == 8
  assert len(metrics.MetricsLog(tmp_path).read()) == 2


# When a save fails; that users see nothing of it, main_test.py tests.
orbax_leaves_coroutines = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def frozen():
  """A function that makes a folder read-only, for root too."""
  folders = []

  def freeze(folder):
    if os.geteuid():
      subprocess.run(["chmod", "-R", "a-w", str(folder)], check=True)
    else:
      command = ["chattr", "-R", "+i", str(folder)]
      if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs a file system with chattr")
    folders.append(folder)

  def thaw():
    for folder in folders:
      command = (
        ["chmod", "-R", "u+w"] if os.geteuid() else ["chattr", "-R", "-i"]
      )
      subprocess.run([*command, str(folder)], check=True)
    folders.clear()

  freeze.thaw = thaw
  yield freeze
  thaw()


def at_step(monkeypatch, step, action):
  """Does something after the given step of this process has been read."""
  calls = itertools.count(1)
  original = calls_lib._read

  def read(*arguments):
    if next(calls) == step:
      action()
    return original(*arguments)

  monkeypatch.setattr(calls_lib, "_read", read)


@orbax_leaves_coroutines
@pytest.mark.parametrize("noticed", ["beforehand", "while saving"])
def test_full_disk(
  long_config,
  straight,
  small_disk,
  monkeypatch,
  one_device,
  noticed,
):
  workdir = small_disk.folder / "run"
  run = functools.partial(train.train_and_evaluate, devices=one_device)
  with monkeypatch.context() as patch:
    if noticed == "while saving":
      patch.setattr(checkpoint, "_SPACE_FACTOR", 0)
    at_step(patch, 7, lambda: small_disk.fill())
    with pytest.raises(errors.WorkdirError, match="no space left") as caught:
      run(long_config, workdir)
  assert "\n" not in str(caught.value)
  small_disk.free()
  # That of step 6 may have been on its way, and one or two more find room where
  # an old one is removed.
  assert saved_steps(workdir)[-1] >= 4
  run(long_config, workdir)
  assert_same_run(long_config, workdir, straight)


@orbax_leaves_coroutines
def test_workdir_becomes_read_only(
  long_config, straight, tmp_path, monkeypatch, one_device, frozen
):
  workdir = tmp_path / "run"
  run = functools.partial(train.train_and_evaluate, devices=one_device)
  message = "(?i)permission.denied|not permitted"
  with monkeypatch.context() as patch:
    at_step(patch, 8, lambda: frozen(workdir))
    with pytest.raises(errors.WorkdirError, match=message) as caught:
      run(long_config, workdir)
  assert "\n" not in str(caught.value)
  with pytest.raises(errors.WorkdirError, match=message):
    run(long_config, workdir)
  frozen.thaw()
  assert saved_steps(workdir)[-1] in (4, 6)
  run(long_config, workdir)
  assert_same_run(long_config, workdir, straight)


def remove(folder):
  """Also while somebody writes there."""
  while folder.exists():
    shutil.rmtree(folder, ignore_errors=True)


@orbax_leaves_coroutines
@pytest.mark.parametrize("step", [5, 6, 8, 12])
def test_workdir_is_removed(
  long_config, straight, tmp_path, monkeypatch, one_device, step
):
  workdir = tmp_path / "run"
  run = functools.partial(train.train_and_evaluate, devices=one_device)
  with monkeypatch.context() as patch:
    at_step(patch, step, lambda: remove(workdir))
    with pytest.raises(
      errors.WorkdirError, match="removed or emptied"
    ) as caught:
      run(long_config, workdir)
  assert "\n" not in str(caught.value)
  run(long_config, workdir)
  assert_same_run(long_config, workdir, straight)


def test_a_run_that_fails_at_once_leaves_nothing(
  tiny_config, tmp_path, monkeypatch, one_device
):
  def load(config, augmentation):
    raise errors.DataError("no data")

  monkeypatch.setattr(datasets, "load", load)
  with pytest.raises(errors.DataError):
    train.train_and_evaluate(tiny_config, tmp_path / "run", devices=one_device)
  assert not (tmp_path / "run").exists()


def test_finished_run_is_not_trained_again(
  tiny_config, tmp_path, monkeypatch, one_device
):
  tiny_config.num_epochs = 1
  run = functools.partial(train.train_and_evaluate, devices=one_device)
  records = run(tiny_config, tmp_path / "run")
  monkeypatch.setattr(datasets, "load", None)
  assert run(tiny_config, tmp_path / "run") == records


def one_score(loss, accuracy):
  """The scores of one network."""
  values = {"loss": loss, "objective": 1.0, "accuracy": accuracy}
  return evaluate.Scores([values], None)


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
    return one_score(loss=1.0, accuracy=accuracy)

  monkeypatch.setattr(evaluate, "evaluate", opposite)
  records = train.train_and_evaluate(
    tiny_config, tmp_path / "run", devices=one_device
  )
  assert sizes == [50, 360] * 2
  assert {"val_loss", "val_accuracy"} < set(records[0])
  assert metrics.best_record(records, "accuracy")["epoch"] == 0
  assert saved_steps(tmp_path / "run") == [4, 8]


def test_the_monitored_metric_chooses_the_best_epoch(
  tiny_config, tmp_path, monkeypatch, one_device
):
  tiny_config.num_epochs = 4
  tiny_config.checkpoint.monitor = "loss"

  def scripted(eval_step, state, *arguments, **keywords):
    """The loss is best after the first epoch, the accuracy after the last."""
    step = int(state.step)
    return one_score(loss=step / 10, accuracy=step / 100)

  monkeypatch.setattr(evaluate, "evaluate", scripted)
  train.train_and_evaluate(tiny_config, tmp_path / "run", devices=one_device)
  assert saved_steps(tmp_path / "run") == [4, 12, 16]


def test_non_finite_evaluation_stops_and_is_never_saved(
  tiny_config, tmp_path, monkeypatch, one_device
):
  scores = one_score(loss=float("nan"), accuracy=0.1)
  monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: scores)
  with pytest.raises(
    errors.NonFiniteError, match="test loss is nan after step"
  ):
    train.train_and_evaluate(tiny_config, tmp_path / "run", devices=one_device)
  assert metrics.MetricsLog(tmp_path / "run").read() == []


def test_non_finite_step_is_never_saved_and_can_be_reproduced(
  tiny_config, tmp_path, one_device, dataset, monkeypatch
):
  tiny_config.optimizer.name = "sgd"
  tiny_config.optimizer.learning_rate = 1e30
  tiny_config.checkpoint.every_steps = 1
  workdir = tmp_path / "run"
  run = functools.partial(
    train.train_and_evaluate, tiny_config, workdir, devices=one_device
  )
  message = r"after step \d .* 1e\+30.* is in .*nonfinite_step\.json"
  with pytest.raises(errors.NonFiniteError, match=message):
    run()
  failure = json.loads((workdir / "nonfinite_step.json").read_text())
  step = failure["step"]
  assert step > 0
  assert (failure["epoch"], failure["step_in_epoch"]) == divmod(step, 4)
  assert saved_steps(workdir)[-1] == failure["latest_checkpoint_step"] == step
  # From the last finite state, by these indexes and this key.
  experiment = experiment_lib.build(tiny_config)
  mesh = mesh_lib.create_mesh(one_device)
  key = jax.random.wrap_key_data(
    jnp.asarray(failure["augmentation_key"], jnp.uint32)
  )
  monkeypatch.setattr(jax.random, "fold_in", lambda key, step: key)
  _, step_metrics = jax.jit(
    functools.partial(train_step.train_step, experiment)
  )(
    restore(tiny_config, workdir),
    *mesh_lib.put(
      (
        dataset.train.images[failure["batch_indexes"]],
        dataset.train.labels[failure["batch_indexes"]],
      ),
      mesh_lib.batch_sharding(mesh),
    ),
    key,
  )
  assert not step_metrics.finite
  monkeypatch.undo()
  # And the same command comes to it again.
  (workdir / "nonfinite_step.json").unlink()
  with pytest.raises(errors.NonFiniteError, match=f"after step {step} "):
    run()
  assert json.loads((workdir / "nonfinite_step.json").read_text()) == failure


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


def test_removed_workdir_is_not_made_anew(
  tiny_config, tmp_path, monkeypatch, one_device
):
  """As Orbax would with its next checkpoint."""
  workdir = tmp_path / "run"
  run = functools.partial(train.train_and_evaluate, devices=one_device)
  append = metrics.MetricsLog.append

  def remove(self, record):
    append(self, record)
    shutil.rmtree(workdir)
    (workdir / "checkpoints").mkdir(parents=True)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.MetricsLog, "append", remove)
    with pytest.raises(errors.WorkdirError, match="was removed or emptied"):
      run(tiny_config, workdir)
  assert not (workdir / "metrics.jsonl").exists()
  assert len(run(tiny_config, workdir)) == 2


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


def test_bfloat16_learns_with_float32_parameters(
  tiny_config, tmp_path, one_device
):
  tiny_config.model.dtype = "bfloat16"
  tiny_config.num_epochs = 4
  records = train.train_and_evaluate(
    tiny_config, tmp_path / "run", devices=one_device
  )
  assert records[-1]["train_loss"] < records[0]["train_loss"]
  state = restore(tiny_config, tmp_path / "run")
  for leaf in jax.tree.leaves((state.params, state.batch_stats)):
    assert leaf.dtype == jnp.float32


@pytest.fixture
def layout(tiny_config, one_device):
  return seeds.Layout.create(tiny_config, one_device)


def test_donated_state_does_not_reach_a_checkpoint(
  tiny_config, tmp_path, dataset, layout
):
  """Saving is asynchronous, and the next step takes the buffers over."""
  experiment = experiment_lib.build(tiny_config)
  state = train.initial_state(tiny_config, experiment, dataset.train, layout)
  key = train.augmentation_key(layout)
  compiled = calls_lib.compile_train_step(experiment, state, 8, key, layout)
  (batch, *_) = epochs.batches(dataset.train, 8, 0, layout)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for _ in range(5):
      state, _ = compiled(state, *batch, key)
      copy = jax.tree.map(lambda x: np.array(x, copy=True), state)
      checkpoints.save(state, {})
      for _ in range(3):
        state, _ = compiled(state, *batch, key)
      checkpoints.wait()
      step = int(copy.step)
      assert_identical(checkpoints.restore(step, state)[0], copy)
