import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import pytest

from configs import base
from resnet_flax.run import (
  checkpoint,
  config as config_lib,
  errors,
  folder as workdir_lib,
  keys,
  rules,
)
from tests.run import damage


def check(folder, config):
  with workdir_lib.use(folder, config):
    pass


def record(folder, config):
  workdir_lib.record_start(folder, config, jax.devices()[:1], "data-1", {})


def start(folder, config):
  check(folder, config)
  record(folder, config)


@pytest.mark.parametrize(
  ("path", "overrides", "expected"),
  [
    ("configs/v1_depth20.py", {}, "v1_depth20"),
    ("v1_depth20.py", {"model.depth": 56}, "v1_depth20,model.depth=56"),
    (
      "a.py",
      {"schedule.drop_inclusive": True, "batch_size": 8},
      "a,batch_size=8,schedule.drop_inclusive=True",
    ),
  ],
)
def test_default_name(path, overrides, expected):
  assert workdir_lib.default_name(path, overrides) == expected


def test_default_names_differ_even_where_they_cannot_be_spelled_out():
  cases = [
    {"a": "x/y"},
    {"a": "x y"},
    {"a": "x_y"},
    {"a": (1, 2)},
    {"a": (1, 3)},
  ]
  cases += [{f"key{k}": "v" * 40 for k in range(9)} | {"z": z} for z in (1, 2)]
  names = [workdir_lib.default_name("a.py", case) for case in cases]
  assert len(set(names)) == len(cases)
  assert all(len(name) < 200 and "/" not in name for name in names)


def test_config_comes_back(tmp_path):
  config = base.get_config()
  start(tmp_path, config)
  stored = workdir_lib.load_config(tmp_path)
  assert stored.is_locked
  assert stored.model.depth == 20
  assert tuple(stored.schedule.drop_percents) == (40, 60, 80, 90)
  # Tuples are lists in JSON; that is no difference.
  start(tmp_path, config)


@pytest.mark.parametrize("written", ["config.json", "environment.json"])
def test_a_run_killed_between_its_first_files_goes_on(tmp_path, written):
  config = base.get_config()
  start(tmp_path, config)
  for path in list(tmp_path.iterdir()):
    if path.name != written:
      path.unlink()
  start(tmp_path, config)
  assert {path.name for path in tmp_path.iterdir()} == {
    "config.json",
    "environment.json",
  }
  assert workdir_lib.load_config(tmp_path).to_dict() == json.loads(
    json.dumps(config.to_dict())
  )


def test_a_run_of_an_older_version_goes_on(tmp_path):
  config = base.get_config()
  start(tmp_path, config)
  path = tmp_path / "config.json"
  stored = json.loads(path.read_text())
  for key in ("num_seeds", "seed_execution", "steps_per_call"):
    del stored[key]
  del stored["model"]["batch_norm_groups"]
  path.write_text(json.dumps(stored))
  workdir_lib.check_same(tmp_path, config)
  assert workdir_lib.load_config(tmp_path).steps_per_call == 0
  config.model.batch_norm_groups = 2
  with pytest.raises(errors.WorkdirError, match=r"groups \(1 there, 2 here\)"):
    workdir_lib.check_same(tmp_path, config)


@pytest.mark.parametrize(
  "name", ["a[1]", "[", os.fsdecode(b"caf\xe9"), "gs:", "lags:", "C:\\a"]
)
def test_paths_that_checkpoints_cannot_have_are_refused(tmp_path, name):
  folder = tmp_path / name / "run"
  with (
    pytest.raises(errors.WorkdirError, match="cannot hold checkpoints"),
    workdir_lib.use(folder, base.get_config()),
  ):
    pass
  assert not folder.parent.exists()


def test_a_name_that_is_too_long_is_one_line(tmp_path):
  with (
    pytest.raises(errors.WorkdirError, match="cannot be written: File name"),
    workdir_lib.use(tmp_path / ("x" * 300), base.get_config()),
  ):
    pass


def test_a_workdir_that_was_not_used_is_removed(tmp_path):
  folder = tmp_path / "run"
  with workdir_lib.use(folder, base.get_config()):
    assert (folder / "lock").exists()
  assert not folder.exists()
  with workdir_lib.use(folder, base.get_config()):
    record(folder, base.get_config())
  assert (folder / "config.json").exists()
  # One that was there before stays.
  (tmp_path / "mine").mkdir()
  with workdir_lib.use(tmp_path / "mine", base.get_config()):
    pass
  assert (tmp_path / "mine").exists()


def test_a_folder_of_runs_is_no_run(tmp_path):
  (tmp_path / "runs" / "one").mkdir(parents=True)
  (tmp_path / "runs" / "one" / "config.json").write_text("{}")
  with pytest.raises(errors.WorkdirError, match=r"such as one\. .*runs/NAME"):
    check(tmp_path / "runs", base.get_config())
  check(tmp_path / "runs" / "two", base.get_config())
  # What a run leaves that was killed as it filled its workdir from a mirror.
  left = tmp_path / "killed" / ".mirror-12345678"
  left.mkdir(parents=True)
  (left / "config.json").write_text("{}")
  check(tmp_path / "killed", base.get_config())


def test_removing_the_workdir_meanwhile_is_no_error(tmp_path):
  with workdir_lib.use(tmp_path / "run", base.get_config()):
    shutil.rmtree(tmp_path / "run")


def test_environment(tmp_path):
  start(tmp_path, base.get_config())
  environment = json.loads((tmp_path / "environment.json").read_text())
  assert environment["libraries"]["jax"] == jax.__version__
  assert environment["devices"] == ["cpu"]
  assert environment["cpu_threads"] >= 1
  for key in ("git_commit", "git_clean", "python", "cpu_model", "platform"):
    assert key in environment
  assert "resumed" not in environment


def test_change_of_environment_is_warned_about_and_noted(tmp_path, caplog):
  start(tmp_path, base.get_config())
  path = tmp_path / "environment.json"
  first = json.loads(path.read_text()) | {"cpu_threads": 99}
  path.write_text(json.dumps(first))
  for _ in range(2):
    start(tmp_path, base.get_config())
  assert "cpu_threads: 99 -> " in caplog.text
  stored = json.loads(path.read_text())
  assert stored["cpu_threads"] == 99
  # Once, not at every start.
  assert len(stored["resumed"]) == 1


def test_other_pixels_are_refused(tmp_path):
  start(tmp_path, base.get_config())
  with pytest.raises(errors.WorkdirError, match="data-1 there, data-2 here"):
    workdir_lib.record_start(
      tmp_path, base.get_config(), jax.devices()[:1], "data-2", {}
    )


@pytest.mark.parametrize("text", ["", "[]", "3", "{"])
def test_damaged_environment_is_one_line(tmp_path, text):
  start(tmp_path, base.get_config())
  (tmp_path / "environment.json").write_text(text)
  with pytest.raises(errors.WorkdirError, match=r"environment\.json"):
    start(tmp_path, base.get_config())


def test_another_configuration_is_refused(tmp_path):
  start(tmp_path, base.get_config())
  before = (tmp_path / "config.json").read_text()
  other = base.get_config()
  other.model.depth = 56
  other.optimizer.learning_rate = 0.1
  with pytest.raises(errors.WorkdirError) as caught:
    check(tmp_path, other)
  assert "model.depth (20 there, 56 here)" in str(caught.value)
  assert "optimizer.learning_rate (0.001 there, 0.1 here)" in str(caught.value)
  assert "no checkpoint: delete it to start again" in str(caught.value)
  # A run that is in its first epoch has none, either.
  (tmp_path / "lock").touch()
  with pytest.raises(errors.WorkdirError) as caught:
    check(tmp_path, other)
  assert "delete" not in str(caught.value)
  assert (tmp_path / "config.json").read_text() == before


def test_another_configuration_at_a_mirror_names_the_mirror(tmp_path):
  """The folder is a copy of the mirror that is removed at once."""
  start(tmp_path, base.get_config())
  other = base.get_config()
  other.num_epochs = 300
  with pytest.raises(errors.WorkdirError) as caught:
    workdir_lib.check_same(tmp_path, other, mirror="gs://b/run")
  text = str(caught.value)
  assert text.startswith("checkpoint.mirror=gs://b/run holds a run of another")
  assert "num_epochs (200 there, 300 here). Pass another checkpoint." in text
  assert str(tmp_path) not in text


@pytest.mark.parametrize("value", ["200", None, -1, True, [200]])
def test_an_edited_number_of_epochs_is_another_configuration(tmp_path, value):
  config = base.get_config()
  start(tmp_path, config)
  path = tmp_path / "config.json"
  stored = json.loads(path.read_text()) | {"num_epochs": value}
  path.write_text(json.dumps(stored))
  with pytest.raises(errors.WorkdirError, match=r"config\.json .* num_epochs="):
    check(tmp_path, config)


@pytest.mark.parametrize(
  ("key", "value", "says"),
  [("num_epochs", 300, True), ("num_epochs", 100, False), ("seed", 300, False)],
)
def test_a_run_that_is_to_be_lengthened_is_answered_with_init_from(
  tmp_path, key, value, says
):
  start(tmp_path, base.get_config())
  (tmp_path / "checkpoints" / "8").mkdir(parents=True)
  (tmp_path / "checkpoints" / "8" / "manifest.json").touch()
  longer = base.get_config()
  longer[key] = value
  with pytest.raises(errors.WorkdirError) as caught:
    check(tmp_path, longer)
  message = (
    "cannot be lengthened (a run with schedule.name=constant can, and one"
    " with warmup_stable_decay until its rate falls);"
    f" --config.init_from={tmp_path} starts"
  )
  assert (message in str(caught.value)) == says


def test_a_resumed_run_leaves_its_configuration_as_it_is(tmp_path):
  """In a longer run only the epochs change, also without newer keys."""
  config = base.get_config()
  config.schedule.name = "constant"
  start(tmp_path, config)
  path = tmp_path / "config.json"
  stored = json.loads(path.read_text())
  del stored["dataset"]["bad_images"]  # Of an older version.
  path.write_text(json.dumps(stored))
  config.eval_batch_size = 7
  start(tmp_path, config)
  assert json.loads(path.read_text()) == stored
  config.num_epochs = 300
  start(tmp_path, config)
  longer = json.loads(path.read_text())
  assert longer["num_epochs"] == 300
  assert longer["eval_batch_size"] == stored["eval_batch_size"]


def test_keys_outside_the_mathematics_may_differ(tmp_path):
  start(tmp_path, base.get_config())
  other = base.get_config()
  other.eval_batch_size = 7
  other.dataset.data_dir = "/elsewhere"
  other.log.tensorboard = False
  other.model.remat = other.model.scan = True
  other.checkpoint.every_steps = 7
  other.checkpoint.every_minutes = 0.5
  check(tmp_path, other)


def test_unwritable_workdir(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.WorkdirError, match="--workdir"):
    check(tmp_path / "file" / "run", base.get_config())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_workdir(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(errors.WorkdirError, match="Permission denied"):
    check(tmp_path, base.get_config())


@pytest.mark.parametrize(
  ("saved", "message"),
  [
    (True, "that it holds are good; the same command resumes"),
    (False, "Nothing is saved; the same command starts again"),
  ],
)
def test_a_disk_that_is_full_says_what_is_left(tmp_path, saved, message):
  if saved:
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    (tmp_path / "checkpoints" / "8" / "manifest.json").touch()
  with (
    pytest.raises(errors.WorkdirError, match=message),
    workdir_lib.explain_write_errors(tmp_path),
  ):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_is_gone_is_one_line(tmp_path, monkeypatch, number):
  """Every question to the system fails there."""
  start(tmp_path, base.get_config())

  def fail(*arguments, **options):
    raise OSError(number, os.strerror(number))

  def lose():
    with (
      monkeypatch.context() as patch,
      workdir_lib.explain_write_errors(tmp_path, running=True),
      checkpoint.Checkpoints(tmp_path),
    ):
      for name in ("stat", "lstat", "listdir", "scandir", "open"):
        patch.setattr(os, name, fail)
      fail()

  with pytest.raises(errors.WorkdirError, match=r"\] .* cannot be read either"):
    lose()


@pytest.mark.parametrize("text", ["", "[1]", '{"a', "nonsense"])
def test_damaged_config_is_one_line(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(errors.WorkdirError, match=r"config\.json"):
    check(tmp_path, base.get_config())


@pytest.mark.parametrize("kind", damage.KINDS)
@pytest.mark.parametrize("name", ["config.json", "environment.json"])
def test_what_is_no_such_file_is_one_line(tmp_path, name, kind):
  start(tmp_path, base.get_config())
  damage.replace(tmp_path / name, kind)
  with pytest.raises(errors.WorkdirError, match=f"{name} cannot be read"):
    start(tmp_path, base.get_config())


@pytest.mark.parametrize("depth", [986, 987, 988, 989, 3000])
def test_a_config_that_is_nested_is_one_line_or_read(tmp_path, depth):
  """Some depths can be parsed, but are too deep for the later code."""
  nested = '{"a": ' * depth + "1" + "}" * depth
  (tmp_path / "config.json").write_text(f'{{"seed": 0, "x": {nested}}}')
  with contextlib.suppress(errors.WorkdirError):
    workdir_lib.load_config(tmp_path)


def test_not_a_workdir(tmp_path):
  with pytest.raises(errors.WorkdirError, match="is not the workdir of a run"):
    workdir_lib.load_config(tmp_path)
  file = tmp_path / "file"
  file.touch()
  assert workdir_lib.read_environment(file) == {}
  with pytest.raises(errors.WorkdirError, match="is not the workdir of a run"):
    workdir_lib.load_config(file)


# ---- The lock

HOLD = """
import pathlib, sys, time
from resnet_flax.run import folder
with folder.exclusive(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
  """Another process that holds the lock."""
  with subprocess.Popen(
    [sys.executable, "-c", HOLD, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()


def test_it_is_removed_at_the_end(tmp_path):
  with workdir_lib.exclusive(tmp_path):
    owner = json.loads((tmp_path / "lock").read_text())
    assert owner["pid"] == os.getpid()
  assert list(tmp_path.iterdir()) == []
  with workdir_lib.exclusive(tmp_path):
    pass


def test_a_folder_that_another_run_has_used_is_left_to_it(tmp_path):
  """It began anew there and has ended, so there is no lock."""
  workdir = tmp_path / "run"
  workdir.mkdir()
  with workdir_lib.exclusive(workdir):
    record(workdir, base.get_config())
    workdir_lib.check_not_removed(workdir)
    shutil.rmtree(workdir)
    assert not workdir_lib.is_taken(workdir)
    workdir.mkdir()
    record(workdir, base.get_config())
    with pytest.raises(errors.WorkdirError, match="belong to another process"):
      workdir_lib.check_not_removed(workdir)


def test_the_configuration_is_checked_when_the_lock_is_held(
  tmp_path, monkeypatch
):
  """Another run may begin and end while this one waits for the lock."""
  exclusive = workdir_lib.exclusive

  @contextlib.contextmanager
  def wait(workdir):
    monkeypatch.setattr(workdir_lib, "exclusive", exclusive)
    start(workdir, base.get_config())
    with exclusive(workdir):
      yield

  monkeypatch.setattr(workdir_lib, "exclusive", wait)
  other = base.get_config()
  other.seed = 1
  with pytest.raises(errors.WorkdirError, match=r"in seed \(0 there, 1 here"):
    check(tmp_path, other)
  assert not (tmp_path / "lock").exists()


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path, holder):
  owner = json.loads((tmp_path / "lock").read_text())
  assert owner["pid"] == holder.pid
  with (
    pytest.raises(errors.WorkdirError) as caught,
    workdir_lib.exclusive(tmp_path),
  ):
    pass
  assert (
    f"in use by process {holder.pid} on {owner['host']} since {owner['since']}"
    in str(caught.value)
  )
  # The first one does not notice.
  assert json.loads((tmp_path / "lock").read_text()) == owner


def test_a_stale_lock_is_taken_over(tmp_path, holder, caplog):
  caplog.set_level("INFO")
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert (tmp_path / "lock").exists()
  with workdir_lib.exclusive(tmp_path):
    owner = json.loads((tmp_path / "lock").read_text())
    assert owner["pid"] == os.getpid()
  assert f"taking over the lock of process {holder.pid}" in caplog.text


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\x00\xff", b"[" * 9999])
def test_a_damaged_stale_lock_is_taken_over(tmp_path, raw):
  (tmp_path / "lock").write_bytes(raw)
  with workdir_lib.exclusive(tmp_path):
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_link_for_a_lock_is_refused(tmp_path):
  """It may lead to a file of the user's, which the lock would replace."""
  precious = tmp_path / "precious"
  precious.write_text("mine")
  (tmp_path / "lock").symlink_to(precious)
  with (
    pytest.raises(errors.WorkdirError, match=r"symbolic links.* be a file"),
    workdir_lib.exclusive(tmp_path),
  ):
    pass
  assert precious.read_text() == "mine"


def test_a_pipe_for_a_lock_is_refused(tmp_path):
  os.mkfifo(tmp_path / "lock")
  with (
    pytest.raises(errors.WorkdirError, match=r"cannot be locked: .* be a file"),
    workdir_lib.exclusive(tmp_path),
  ):
    pass


def test_a_file_system_without_locks_is_warned_about(
  tmp_path, monkeypatch, caplog
):
  def flock(*arguments):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(fcntl, "flock", flock)
  with workdir_lib.exclusive(tmp_path):
    pass
  assert "cannot be locked (Operation not supported)" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_lock_that_cannot_be_had_for_other_reasons_is_refused(
  tmp_path, monkeypatch, number
):
  def flock(*arguments):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, "flock", flock)
  with (
    pytest.raises(errors.WorkdirError, match="lock cannot be locked"),
    workdir_lib.exclusive(tmp_path),
  ):
    pass


# ---- Whole files


def test_stored_configurations_get_keys_that_came_later(tmp_path):
  path = tmp_path / "config.json"
  path.write_text('{"seed": 1, "model": {"depth": 8}, "schedule": {}}')
  filled = workdir_lib.load_config(tmp_path)
  flat = keys.to_flat(filled)
  # As JSON stores them.
  defaults = json.loads(json.dumps(config_lib.default_config().to_dict()))
  expected = keys.flatten(defaults)
  assert flat == expected | {"seed": 1, "model.depth": 8}
  rules.check(filled, num_devices=1)
  # What is no configuration does not become the default one.
  path.write_text('{"model": {"depth": 8}}')
  with pytest.raises(errors.WorkdirError, match="seed must be an integer"):
    workdir_lib.load_config(tmp_path)
