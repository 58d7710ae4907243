import dataclasses
import errno
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from resnet_flax import data, step as step_lib, train
from resnet_flax.models.kernels import onednn
from resnet_flax.parallel import evaluate, program
from resnet_flax.run import (
  checkpoint,
  errors,
  experiment as experiment_lib,
  load,
  metrics,
  mirror,
  progress,
  session,
  signals as signals_lib,
)
from resnet_flax.tools.report import runs
from tests.helpers import (
  Programs,
  assert_identical,
  assert_same_run,
  at_event,
  changed,
  contents,
  die,
  initial,
  layout_of,
  restore,
  saved_steps,
)

slow = pytest.mark.slow


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
    "train_accuracy",
    "train_loss",
    "train_objective",
    "train_top5",
    "test_accuracy",
    "test_loss",
    "test_objective",
    "test_top5",
    "epoch_seconds",
    "data_seconds",
    "images_per_second",
    "evaluation_seconds",
  ]
  assert records[1]["train_accuracy"] < records[1]["train_top5"] <= 1
  assert 0 < records[0]["data_seconds"] < records[0]["epoch_seconds"]
  assert records[0]["evaluation_seconds"] > 0
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


@pytest.fixture(scope="module")
def programs():
  return Programs()


@pytest.fixture
def run(long_config, one_device, programs):
  """Trains `long_config` in a workdir; to be given events."""
  return functools.partial(programs.train, long_config, devices=one_device)


@pytest.fixture(scope="module")
def straight(long_config, tmp_path_factory, programs):
  """The workdir of the uninterrupted run."""
  workdir = tmp_path_factory.mktemp("straight")
  programs.train(long_config, workdir, devices=jax.devices()[:1])
  return workdir


@pytest.mark.parametrize(
  ("number", "code", "step"),
  [
    (signal.SIGINT, 130, 1),
    pytest.param(signal.SIGTERM, 143, 1, marks=slow),
    pytest.param(signal.SIGTERM, 143, 2, marks=slow),
    # At the end of an epoch, and where a checkpoint is due anyway.
    pytest.param(signal.SIGTERM, 143, 4, marks=slow),
    pytest.param(signal.SIGTERM, 143, 6, marks=slow),
    pytest.param(signal.SIGTERM, 143, 12, marks=slow),
  ],
)
@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_saves_and_the_run_resumes_bit_identically(
  straight, long_config, run, tmp_path, number, code, step
):
  raise_signal = functools.partial(os.kill, os.getpid(), number)
  with pytest.raises(errors.Interrupted) as caught:
    run(tmp_path, on_event=at_event("step", step, raise_signal))
  assert caught.value.exit_code == code
  assert f"stopped by {signal.Signals(number).name}" in str(caught.value)
  assert f"saved up to step {step} in" in str(caught.value)
  assert saved_steps(tmp_path)[-1] == step
  run(tmp_path)
  assert_same_run(long_config, tmp_path, straight)


@pytest.mark.parametrize(
  ("event", "count"),
  [
    pytest.param("compile", 1, marks=slow),
    pytest.param("step", 1, marks=slow),
    ("step", 6),
    pytest.param("step", 12, marks=slow),
    pytest.param("save", 1, marks=slow),
    ("save", 5),
    ("manifest", 3),
    pytest.param("evaluate", 1, marks=slow),
    ("evaluate", 6),
    ("record", 2),
    pytest.param("record", 3, marks=slow),
  ],
)
def test_a_run_that_died_resumes_bit_identically(
  long_config, straight, run, tmp_path, event, count
):
  # In Orbax's thread, whose errors are found when it is waited for.
  with pytest.raises((SystemExit, errors.WorkdirError)):
    run(tmp_path, on_event=at_event(event, count, die))
  run(tmp_path)
  assert_same_run(long_config, tmp_path, straight)


def test_record_without_its_checkpoint_is_cut_off(
  long_config, straight, run, tmp_path
):
  """A kill before the checkpoint is on disk leaves such a record."""
  with pytest.raises(SystemExit):
    run(tmp_path, on_event=at_event("step", 7, die))
  log = metrics.MetricsLog(tmp_path)
  log.append({**log.read()[0], "epoch": 1, "step": 8})
  run(tmp_path)
  assert_same_run(long_config, tmp_path, straight)


@pytest.mark.parametrize("which", ["latest", "all"])
def test_damaged_checkpoints_are_trained_again_bit_identically(
  long_config, straight, run, tmp_path, which, caplog
):
  workdir = tmp_path / "run"
  shutil.copytree(straight, workdir)
  steps = saved_steps(workdir)
  assert len(steps) > 1
  for step in steps if which == "all" else steps[-1:]:
    folder = workdir / f"checkpoints/{step}/state"
    path = max(
      (path for path in folder.rglob("*") if path.is_file()),
      key=lambda path: path.stat().st_size,
    )
    path.write_bytes(path.read_bytes()[:-1])
  if which == "all":
    with pytest.raises(errors.WorkdirError, match="is good"):
      run(workdir)
    return
  run(workdir)
  assert "is damaged" in caplog.text
  assert_same_run(long_config, workdir, straight)


@slow
@pytest.mark.parametrize(("first", "then"), [(1, 8), (8, 1)])
def test_a_run_resumes_on_other_devices(
  long_config, straight, programs, tmp_path, first, then
):
  run = functools.partial(programs.train, long_config, tmp_path)
  with pytest.raises(SystemExit):
    run(devices=jax.devices()[:first], on_event=at_event("step", 7, die))
  records = run(devices=jax.devices()[:then])
  expected = metrics.MetricsLog(straight).read()
  for record, reference in zip(records, expected, strict=True):
    # Sums over devices are rounded in another order.
    assert record["train_loss"] == pytest.approx(
      reference["train_loss"], rel=1e-3
    )


@slow
def test_a_clock_that_is_set_back_does_not_matter(
  long_config, straight, run, tmp_path, monkeypatch
):
  times = itertools.count(2e9, -3600)
  monkeypatch.setattr(time, "time", lambda: next(times))
  with pytest.raises(SystemExit):
    run(tmp_path, on_event=at_event("step", 7, die))
  run(tmp_path)
  assert_same_run(long_config, tmp_path, straight)


@pytest.mark.parametrize(
  ("minutes", "seconds", "expected"),
  [
    (2.0, 60.0, [2, 4, 6, 8]),
    (2.0, 59.0, [3, 4, 7, 8]),  # The end of an epoch starts it anew.
    (1e-9, 1.0, [1, 2, 3, 4, 5, 6, 7, 8]),
    (0.0, 1e9, [4, 8]),
  ],
)
def test_checkpoints_by_the_clock(
  minutes, seconds, expected, tiny_config, tmp_path, programs, monkeypatch
):
  """Each step takes so many seconds."""
  tiny_config.checkpoint.every_minutes = minutes
  events = []

  def monotonic():
    return seconds * events.count("step")

  clock = types.SimpleNamespace(
    monotonic=monotonic, perf_counter=time.perf_counter
  )
  monkeypatch.setattr(session, "time", clock)
  programs.train(
    *(tiny_config, tmp_path),
    devices=jax.devices()[:1],
    on_event=events.append,
  )
  saves = [k for k, event in enumerate(events) if event == "save"]
  assert [events[:k].count("step") for k in saves] == expected


def test_a_second_run_in_the_same_workdir_is_refused(
  tiny_config, tmp_path, one_device, programs
):
  run = functools.partial(
    programs.train, tiny_config, tmp_path, devices=one_device
  )
  seen = []

  def other():
    with pytest.raises(errors.WorkdirError, match="in use by process") as error:
      run()
    seen.append(error)

  run(on_event=at_event("step", 3, other))
  assert len(seen) == 1
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


@orbax_leaves_coroutines
@pytest.mark.parametrize(
  "noticed", ["beforehand", pytest.param("while saving", marks=slow)]
)
def test_full_disk(
  long_config, straight, run, small_disk, monkeypatch, noticed
):
  workdir = small_disk.folder / "run"
  with monkeypatch.context() as patch:
    if noticed == "while saving":
      patch.setattr(checkpoint, "SPACE_FACTOR", 0)
    with pytest.raises(errors.WorkdirError, match="no space left") as caught:
      run(workdir, on_event=at_event("step", 8, small_disk.fill))
  assert "\n" not in str(caught.value)
  small_disk.free()
  # The one of step 6 may have been on its way, and one or two more find room
  # where an old one is removed.
  assert saved_steps(workdir)[-1] >= 4
  run(workdir)
  assert_same_run(long_config, workdir, straight)


@orbax_leaves_coroutines
def test_workdir_becomes_read_only(
  long_config, straight, run, tmp_path, frozen
):
  workdir = tmp_path / "run"
  message = "(?i)permission.denied|not permitted"
  with pytest.raises(errors.WorkdirError, match=message) as caught:
    run(workdir, on_event=at_event("step", 8, lambda: frozen(workdir)))
  assert "\n" not in str(caught.value)
  with pytest.raises(errors.WorkdirError, match=message):
    run(workdir)
  frozen.thaw()
  assert saved_steps(workdir)[-1] in (4, 6)
  run(workdir)
  assert_same_run(long_config, workdir, straight)


def remove(folder):
  """Removes a folder, also while somebody writes there."""
  while folder.exists():
    shutil.rmtree(folder, ignore_errors=True)


@orbax_leaves_coroutines
@pytest.mark.parametrize(
  ("event", "count"),
  [
    pytest.param("step", 6, marks=slow),
    ("step", 8),
    pytest.param("step", 12, marks=slow),
    ("record", 2),
  ],
)
def test_workdir_is_removed(long_config, straight, run, tmp_path, event, count):
  """It is not made anew, as Orbax would with its next checkpoint."""
  workdir = tmp_path / "run"
  on_event = at_event(event, count, lambda: remove(workdir))
  with pytest.raises(errors.WorkdirError, match="removed or emptied") as caught:
    run(workdir, on_event=on_event)
  assert "\n" not in str(caught.value)
  assert not (workdir / "metrics.jsonl").exists()
  run(workdir)
  assert_same_run(long_config, workdir, straight)


@slow
def test_a_workdir_that_was_begun_anew_is_left_to_the_new_run(
  tiny_config, tmp_path, one_device, caplog, monkeypatch
):
  """Its owner has forgotten the process that still trains."""
  workdir = tmp_path / "run"
  run = functools.partial(
    train.train_and_evaluate, workdir=workdir, devices=one_device
  )
  mirrored = changed(tiny_config)
  mirrored.checkpoint.mirror = str(tmp_path / "disk")
  monkeypatch.setattr(mirror, "_POLL", 600.0)  # It copies at the end.
  monkeypatch.setattr(mirror, "_WHEN_STOPPED", 3.0)
  seen = []

  def begin_anew():
    shutil.rmtree(workdir)
    with pytest.raises(SystemExit):
      run(tiny_config, on_event=at_event("step", 6, die))
    # The lock of a process that lives.
    owner = {"host": "elsewhere", "pid": 1, "since": "now"}
    (workdir / "lock").write_text(json.dumps(owner))
    seen.append(contents(workdir))

  with pytest.raises(errors.WorkdirError, match="belong to process 1 on e"):
    run(mirrored, on_event=at_event("step", 6, begin_anew))
  assert "nothing more is copied" in caplog.text
  assert not mirror._Store(str(tmp_path / "disk")).states()
  (before,) = seen
  assert contents(workdir) == before


def test_a_disk_that_is_gone_does_not_keep_a_signal_from_ending_the_run(
  tiny_config, tmp_path, one_device, monkeypatch
):
  stops = signals_lib.StopSignals()

  def ask():
    gone = mock.Mock(side_effect=OSError(errno.EIO, "Input/output error"))
    with monkeypatch.context() as patch:
      patch.setattr(checkpoint, "steps", gone)
      assert "has no saved step:" in stops.exit_message()

  train.train_and_evaluate(
    *(tiny_config, tmp_path / "run"),
    devices=one_device,
    signals=stops,
    on_event=at_event("step", 2, ask),
  )


def test_a_run_that_fails_at_once_leaves_nothing(
  tiny_config, tmp_path, monkeypatch, one_device
):
  def load(config, augmentation):
    raise errors.DataError("no data")

  monkeypatch.setattr(data.dataset, "load", load)
  with pytest.raises(errors.DataError):
    train.train_and_evaluate(tiny_config, tmp_path / "run", devices=one_device)
  assert not (tmp_path / "run").exists()


def test_what_runs_before_a_save_is_no_training_time(
  tiny_config, tmp_path, one_device, programs, monkeypatch
):
  """The clock moves only when it is read and in the hook."""
  now = [0.0]

  def clock():
    now[0] += 0.001
    return now[0]

  def hook(step, state):
    now[0] += 1_000
    return state

  monkeypatch.setattr(
    session, "time", types.SimpleNamespace(perf_counter=clock, monotonic=clock)
  )
  monkeypatch.setattr(
    train.batch_statistics, "create_hook", lambda *arguments: hook
  )
  records = programs.train(tiny_config, tmp_path, devices=one_device)
  assert now[0] > 1_000 * len(records)
  assert all(0 < record["epoch_seconds"] < 1 for record in records)


def test_finished_run_is_not_trained_again(
  tiny_config, tmp_path, monkeypatch, one_device
):
  tiny_config.num_epochs = 1
  run = functools.partial(
    train.train_and_evaluate, tiny_config, tmp_path / "run", devices=one_device
  )
  records = run()
  monkeypatch.setattr(evaluate, "evaluate", None)
  monkeypatch.setattr(program, "create", None)
  assert run() == records


@pytest.mark.parametrize("lines", [[0, 2], [0, 0, 1]])
def test_records_of_other_epochs_are_refused(straight, run, tmp_path, lines):
  """A line is gone, or there twice: the run does not go on from there."""
  workdir = tmp_path / "run"
  shutil.copytree(straight, workdir)
  log = workdir / "metrics.jsonl"
  kept = log.read_text().splitlines(keepends=True)
  log.write_text("".join(kept[line] for line in lines))
  for use in (run, load.load_model):
    with pytest.raises(errors.WorkdirError, match=r"metrics\.jsonl, line 2: "):
      use(workdir)


def test_a_plateau_is_that_of_any_eval_batch_size(tiny_config):
  tiny_config.plateau.enabled = True
  layout = layout_of(tiny_config)
  experiment, _, state, _ = initial(tiny_config, layout)
  one, other = (
    train._after_epoch(state, {"test_objective": loss}, experiment, layout)
    for loss in (1.9940672, 1.9940668)
  )
  assert_identical(layout.get(one), layout.get(other))
  record = {"test_objective": 1.99405}
  better = train._after_epoch(state, record, experiment, layout)
  plateaus = [layout.get(s)[0].rate_state["plateau"] for s in (one, better)]
  assert plateaus[0].best_value > plateaus[1].best_value


@pytest.mark.parametrize(
  ("setting", "name"),
  [
    (jax.enable_x64(True), "jax_enable_x64=True"),
    (jax.disable_jit(), "jax_disable_jit=True"),
    (
      jax.numpy_dtype_promotion("strict"),
      "jax_numpy_dtype_promotion=strict",
    ),
  ],
)
def test_settings_of_jax_that_cannot_be_are_refused_by_name(
  setting, name, tiny_config, tmp_path
):
  with setting, pytest.raises(errors.ConfigError, match=name):
    train.train_and_evaluate(tiny_config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_finished_run_is_refused_on_other_data_and_prints_without_any(
  tiny_config, tmp_path, monkeypatch, one_device, caplog
):
  tiny_config.num_epochs = 1
  run = functools.partial(
    train.train_and_evaluate, tiny_config, tmp_path / "run", devices=one_device
  )
  records = run()
  load = data.dataset.load

  def other(config):
    return dataclasses.replace(load(config), source="digits-2")

  monkeypatch.setattr(data.dataset, "load", other)
  monkeypatch.setenv("HOME", str(tmp_path))
  for workdir in (tmp_path / "run", "~/run"):
    with pytest.raises(errors.WorkdirError, match="digits there, digits-2"):
      train.train_and_evaluate(tiny_config, workdir, devices=one_device)

  def gone(config):
    raise errors.DataError("no copy")

  caplog.set_level("INFO")
  monkeypatch.setattr(data.dataset, "load", gone)
  assert run() == records
  assert "data was not checked: no copy" in caplog.text


def test_a_finished_run_downloads_nothing(tiny_config, tmp_path, caplog):
  """It only says that there is no copy to compare."""
  caplog.set_level("INFO")
  tiny_config.dataset.name = "cifar10"
  empty = tmp_path / "empty"
  empty.mkdir()
  tiny_config.dataset.data_dir = str(empty)
  load.check_local_data(tiny_config, tmp_path)
  assert "not checked: there is no cifar10 in" in caplog.text
  assert list(tmp_path.rglob("*")) == [empty]


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
    accuracy = 0.5 + sign * state.step / 100
    return one_score(loss=1.0, accuracy=accuracy)

  monkeypatch.setattr(evaluate, "evaluate", opposite)
  records = train.train_and_evaluate(
    tiny_config, tmp_path / "run", devices=one_device
  )
  assert sizes == [50, 360] * 2
  assert {"val_loss", "val_accuracy"} < set(records[0])
  assert metrics.best_record(records, "accuracy")["epoch"] == 0
  assert saved_steps(tmp_path / "run") == [4, 8]


def test_only_scored_epochs_are_scored_and_can_be_the_best(
  tiny_config, tmp_path, monkeypatch, one_device, programs
):
  tiny_config.num_epochs, tiny_config.eval_every_epochs = 5, 2
  workdir = tmp_path / "run"

  def scripted(eval_step, state, *arguments, **keywords):
    """The accuracy falls during training."""
    return one_score(loss=1.0, accuracy=1 / state.step)

  def trained(on_event=lambda name: None):
    return programs.train(
      tiny_config, workdir, devices=one_device, on_event=on_event
    )

  with monkeypatch.context() as patch:
    patch.setattr(evaluate, "evaluate", scripted)
    # Without a best epoch, and after the first one.
    for _ in range(2):
      with pytest.raises(SystemExit):
        trained(at_event("save", 2, die))
    records = trained()
  scored = [r["epoch"] for r in records if "test_accuracy" in r]
  assert scored == [1, 3, 4]
  assert metrics.best_record(records, "accuracy")["epoch"] == 1
  assert metrics.best_records(records[:1], "accuracy") == []
  assert saved_steps(workdir) == [8, 16, 20]
  assert load.load_model(workdir).step == 8
  assert trained() == records
  # What reads runs shows what is there.
  (read,) = runs.read([workdir])
  assert read.chosen_by == "test_accuracy"
  curve = runs.group([read])[0].curves("test_accuracy")
  assert np.isnan(curve).tolist() == [[True, False, True, False, False]]


def test_the_monitored_metric_chooses_the_best_epoch(
  tiny_config, tmp_path, monkeypatch, one_device, programs
):
  tiny_config.num_epochs = 4
  tiny_config.checkpoint.monitor = "loss"

  def scripted(eval_step, state, *arguments, **keywords):
    """The loss is best after the first epoch, the accuracy after the last."""
    step = state.step
    return one_score(loss=step / 10, accuracy=step / 100)

  monkeypatch.setattr(evaluate, "evaluate", scripted)
  programs.train(tiny_config, tmp_path / "run", devices=one_device)
  assert saved_steps(tmp_path / "run") == [4, 12, 16]


def test_a_save_in_progress_does_not_make_a_removed_workdir_anew(run, tmp_path):
  """Otherwise the run could not start anew, since it would lack the records."""
  workdir = tmp_path / "run"
  # In Orbax's thread, before the checkpoint has its name.
  on_event = at_event("manifest", 2, lambda: (workdir / "config.json").unlink())
  with pytest.raises(errors.WorkdirError, match="removed or emptied"):
    run(workdir, on_event=on_event)
  assert saved_steps(workdir) == [3]


@slow
def test_bfloat16_learns_as_float32_does(tmp_path, monkeypatch, one_device):
  """Over three seeds, the difference is within their spread."""
  monkeypatch.setattr(onednn, "enabled", True)
  if not onednn.can_convolve(jnp.bfloat16):
    pytest.skip("this processor has no bfloat16")
  config = quickstart.get_config()
  config.num_epochs, config.num_seeds, config.log.tensorboard = 3, 3, False
  config.dataset.train_examples = 384
  losses = {}
  for config.model.dtype in ("float32", "bfloat16"):
    records = train.train_and_evaluate(
      config, tmp_path / config.model.dtype, devices=one_device
    )
    of_seeds = [metrics.of_seeds(record) for record in records]
    losses[config.model.dtype] = np.array(
      [[seed["train_loss"] for seed in each] for each in of_seeds]
    )
  mean = losses["float32"].mean(axis=1)
  spread = losses["float32"].std(axis=1, ddof=1)
  difference = losses["bfloat16"].mean(axis=1) - mean
  assert mean[-1] < 0.8 * mean[0]
  # The standard error of the difference is 0.8 of the spread; and 2 %.
  assert (np.abs(difference) < 3 * 0.8 * spread + 0.02 * mean).all()


@slow
def test_a_run_at_a_constant_rate_can_be_lengthened_not_shortened(
  tiny_config, tmp_path, one_device, programs
):
  tiny_config.schedule.name = "constant"
  for name, lengths in (("longer", (1, 3)), ("straight", (3,))):
    for tiny_config.num_epochs in lengths:
      programs.train(tiny_config, tmp_path / name, devices=one_device)
  assert_same_run(tiny_config, tmp_path / "longer", tmp_path / "straight")
  tiny_config.num_epochs = 2
  with pytest.raises(
    errors.WorkdirError, match=r"num_epochs \(3 there, 2 here"
  ):
    programs.train(tiny_config, tmp_path / "longer", devices=one_device)
  # A run that scores some epochs keeps the score of its former last one.
  tiny_config.eval_every_epochs = 3
  for tiny_config.num_epochs in (1, 3):
    found = programs.train(tiny_config, tmp_path / "some", devices=one_device)
  straight = metrics.MetricsLog(tmp_path / "straight").read()
  scores = [record.get("test_loss") for record in found]
  assert scores == [straight[0]["test_loss"], None, straight[2]["test_loss"]]


@slow
def test_a_run_can_be_lengthened_until_its_rate_falls(
  tiny_config, tmp_path, one_device
):
  tiny_config.schedule.name = "warmup_stable_decay"
  tiny_config.schedule.decay_percent = 50
  run = functools.partial(train.train_and_evaluate, tiny_config)
  tiny_config.num_epochs = 4
  with pytest.raises(SystemExit):
    run(
      tmp_path / "longer",
      devices=one_device,
      on_event=at_event("record", 2, die),
    )
  tiny_config.num_epochs = 6
  for name in ("longer", "straight"):
    run(tmp_path / name, devices=one_device)
  assert_same_run(tiny_config, tmp_path / "longer", tmp_path / "straight")
  tiny_config.num_epochs = 8
  with pytest.raises(errors.WorkdirError, match="until its rate falls"):
    run(tmp_path / "longer", devices=one_device)


@pytest.mark.parametrize(
  ("name", "changes", "devices"),
  [
    pytest.param("muon", {"steps_per_call": 3}, 1, marks=slow),
    pytest.param(
      *("lamb", {"num_seeds": 2, "seed_execution": "vectorized"}, 2),
      marks=slow,
    ),
    pytest.param("optax/adafactor", {"model.scan": True}, 1, marks=slow),
  ],
)
def test_a_run_resumes_between_accumulated_steps(
  tiny_config, tmp_path, programs, name, changes, devices
):
  """It accumulates three steps, across the ends of epochs of four."""
  tiny_config.update_from_flattened_dict(changes)
  if "model.scan" in changes:
    tiny_config.model.depth = 14  # Two like blocks in a stage.
  tiny_config.optimizer.update(
    {"name": name, "accumulate_steps": 3, "clip_norm": 0.5, "l2": 0.0}
  )
  tiny_config.optimizer.weight_decay = 0.1
  tiny_config.log.norms = True
  tiny_config.schedule.name = "onecycle"
  tiny_config.checkpoint.every_steps = 5
  run = functools.partial(
    programs.train, tiny_config, devices=jax.devices()[:devices]
  )
  run(tmp_path / "straight")
  with pytest.raises(SystemExit):
    run(tmp_path / "died", on_event=at_event("save", 3, die))
  assert saved_steps(tmp_path / "died")[-1] == 5
  run(tmp_path / "died")
  assert_same_run(tiny_config, tmp_path / "died", tmp_path / "straight")
  record = metrics.MetricsLog(tmp_path / "died").read()[-1]
  assert 0 < record["train_gradient_norm"] < record["train_weight_norm"] < 100
  last = restore(tiny_config, tmp_path / "died")
  assert np.ravel(last.opt_state.gradient_step)[0] == 2
  assert np.ravel(last.opt_state.mini_step)[0] == 2


def test_non_finite_evaluation_stops_and_is_never_saved(
  tiny_config, tmp_path, monkeypatch, one_device, programs
):
  scores = one_score(loss=float("nan"), accuracy=0.1)
  monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: scores)
  with pytest.raises(
    errors.NonFiniteError, match="test loss is nan after step"
  ):
    programs.train(tiny_config, tmp_path / "run", devices=one_device)
  assert metrics.MetricsLog(tmp_path / "run").read() == []


def test_non_finite_step_is_never_saved_and_can_be_reproduced(
  tiny_config, tmp_path, one_device, monkeypatch
):
  tiny_config.optimizer.name = "sgd"
  tiny_config.optimizer.learning_rate = 1e30
  tiny_config.checkpoint.every_steps = 1
  workdir = tmp_path / "run"
  run = functools.partial(
    train.train_and_evaluate, tiny_config, workdir, devices=one_device
  )
  message = r"after step \d .* 1e\+30.* see .*nonfinite_step\.json"
  with pytest.raises(errors.NonFiniteError, match=message):
    run()
  failure = json.loads((workdir / "nonfinite_step.json").read_text())
  step = failure["step"]
  assert step > 0
  assert (failure["epoch"], failure["step_in_epoch"]) == divmod(step, 4)
  assert saved_steps(workdir)[-1] == failure["latest_checkpoint_step"] == step
  # From the last finite state, by these indexes and this key.
  experiment = experiment_lib.build(tiny_config)
  split = data.load(tiny_config.dataset).train
  rows = np.searchsorted(split.indices, failure["batch_indexes"])
  key = jax.random.wrap_key_data(
    jnp.asarray(failure["augmentation_key"], jnp.uint32)
  )
  monkeypatch.setattr(jax.random, "fold_in", lambda key, step: key)
  _, step_metrics = jax.jit(functools.partial(step_lib.train_step, experiment))(
    restore(tiny_config, workdir),
    *split.take(rows),
    key,
  )
  assert not step_metrics.finite
  monkeypatch.undo()
  # And the same command comes to it again.
  (workdir / "nonfinite_step.json").unlink()
  with pytest.raises(errors.NonFiniteError, match=f"after step {step} "):
    run()
  assert json.loads((workdir / "nonfinite_step.json").read_text()) == failure


@pytest.mark.parametrize(
  ("error", "raised"),
  [
    (OSError(28, "No space left on device"), errors.WorkdirError),
    # A mistake in the program is not disguised.
    (RuntimeError("a mistake"), RuntimeError),
  ],
)
def test_an_error_while_recording(
  tiny_config, tmp_path, one_device, error, raised, programs
):
  def fail():
    raise error

  run = functools.partial(
    programs.train, tiny_config, tmp_path, devices=one_device
  )
  match = "no space left on the disk|a mistake"
  with pytest.raises(raised, match=match):
    run(on_event=at_event("record", 2, fail))
  assert len(run()) == 2


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


def test_donated_state_does_not_reach_a_checkpoint(tiny_config, tmp_path):
  """Saving is asynchronous, and the next step takes the buffers over."""
  layout = layout_of(tiny_config)
  experiment, split, state, key = initial(tiny_config, layout)
  training = program.create(tiny_config, experiment, state, split, key, layout)
  batch = next(training.batches(0, 0))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    for _ in range(5):
      state, _ = training.step(state, batch)
      (copy,) = layout.get(state)
      copy = jax.tree.map(lambda x: np.array(x, copy=True), copy)
      notes = {"learning_rate": [0.1], "epoch_seconds": 0.0}
      checkpoints.save(layout.get(state)[0], notes)
      for _ in range(3):
        state, _ = training.step(state, batch)
      checkpoints.wait()
      assert_identical(
        checkpoint.restore(tmp_path, int(copy.step), copy)[0], copy
      )


def test_metrics_are_read_one_step_late(
  tiny_config, tmp_path, one_device, programs
):
  """Meanwhile the devices work on the next step."""
  events = []

  def on_event(name):
    events.append(name)

  with pytest.MonkeyPatch.context() as patch:
    step = progress.Progress.step

    def reading(self, of_seeds):
      events.append(f"read {int(of_seeds[0].step)}")
      step(self, of_seeds)

    patch.setattr(progress.Progress, "step", reading)
    programs.train(tiny_config, tmp_path, devices=one_device, on_event=on_event)
  first_epoch = events[: events.index("save")]
  assert first_epoch == [
    *("compile", "step", "step", "read 0", "step", "read 1", "step", "read 2"),
    "read 3",
  ]


@pytest.mark.parametrize("num_seeds", [1, pytest.param(2, marks=slow)])
def test_a_metric_that_a_checkpoint_lacks(
  tiny_config, tmp_path, one_device, monkeypatch, num_seeds
):
  """It resumes; the record of the epoch in progress leaves the metric out."""
  tiny_config.num_seeds = num_seeds
  tiny_config.checkpoint.every_steps = 2
  run = functools.partial(
    train.train_and_evaluate, tiny_config, tmp_path, devices=one_device
  )
  with pytest.raises(SystemExit):
    run(on_event=at_event("step", 3, die))
  metric_sums = step_lib.metric_sums

  def with_confidence(loss, objective, logits, labels, mask):
    sums = metric_sums(loss, objective, logits, labels, mask)
    highest = jnp.max(jax.nn.softmax(logits), axis=-1)
    return sums | {"confidence": jnp.sum(highest * mask)}

  monkeypatch.setattr(step_lib, "metric_sums", with_confidence)
  first, second = run()
  assert "train_confidence" not in first
  assert 0.1 < first["test_confidence"] <= 1
  assert 0.1 < second["train_confidence"] <= 1
  if num_seeds > 1:
    assert "train_confidence_std" in second
  # And a checkpoint with more metrics than the program knows.
  monkeypatch.undo()
  tiny_config.num_epochs = 2
  assert load.load_model(tmp_path, "latest").step == 8


def test_each_seed_has_a_plateau_of_its_own(tiny_config):
  config = changed(tiny_config, num_seeds=2)
  config.plateau.enabled = True
  layout = layout_of(config, num_seeds=2)
  experiment, _, state, _ = initial(config, layout)
  record = {"test_objective": 2.0, "epoch": 0, "step": 4}
  record["seeds"] = [{"test_objective": 1.0}, {"test_objective": 3.0}]
  after = layout.get(train._after_epoch(state, record, experiment, layout))
  best = [one.rate_state["plateau"].best_value for one in after]
  assert best == [1.0, 3.0]


@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_stops_an_evaluation(tiny_config, tmp_path, one_device):
  tiny_config.num_epochs = 1
  terminate = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
  with pytest.raises(errors.Interrupted, match="saved up to step 4 in"):
    train.train_and_evaluate(
      *(tiny_config, tmp_path / "run"),
      devices=one_device,
      on_event=at_event("evaluate", 1, terminate),
    )
  assert saved_steps(tmp_path / "run") == [4]
