"""A run that outlives its machine; cloud servers are emulated."""

import contextlib
import errno
import functools
import http.server
import itertools
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from unittest import mock

import pytest
from fsspec.implementations.local import LocalFileSystem

from resnet_flax import train
from resnet_flax.run import checkpoint, errors, files, folder, mirror
from tests.helpers import assert_same_run, at_event, changed, contents

ROOT = pathlib.Path(__file__).parents[2]
AWS = {
  "AWS_ACCESS_KEY_ID": "test",
  "AWS_SECRET_ACCESS_KEY": "test",
  "AWS_DEFAULT_REGION": "us-east-1",
}


def start_s3(monkeypatch, port=0):
  """A server, which has what an earlier one had."""
  boto3 = pytest.importorskip("boto3")
  pytest.importorskip("s3fs")
  moto = pytest.importorskip("moto.server")
  server = moto.ThreadedMotoServer(port=port, verbose=False)
  server.start()
  url = "http://{}:{}".format(*server.get_host_and_port())
  for name, value in {**AWS, "AWS_ENDPOINT_URL": url}.items():
    monkeypatch.setenv(name, value)
  boto3.client("s3").create_bucket(Bucket="bucket")
  return server


@pytest.fixture(params=["folder", "s3", "gs"])
def address(request, tmp_path, monkeypatch):
  """An empty address of each kind, on a server of this machine."""
  if request.param == "folder":
    yield str(tmp_path / "disk" / "run")
    return
  if request.param == "s3":
    server = start_s3(monkeypatch)
  else:
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server(
      "localhost", 0, in_memory=True, default_bucket="bucket"
    )
    server.start()
    port = server._api._httpd.server_port
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
  yield f"{request.param}://bucket/runs/{tmp_path.name}"
  server.stop()


def save(workdir, step, records):
  """What a run has written after so many steps."""
  folder = workdir / "checkpoints" / str(step)
  array = folder / "state" / "array"
  array.parent.mkdir(parents=True, exist_ok=True)
  array.write_bytes(step.to_bytes(4, "big") * 1000)
  (folder / "_CHECKPOINT_METADATA").write_text("{}")  # Orbax's.
  manifest = {"format": checkpoint._FORMAT, "step": step}
  manifest["files"] = {"state/array": files.digest_of(array)}
  manifest["sha256"] = checkpoint._seal(manifest)
  (folder / "manifest.json").write_text(json.dumps(manifest))
  (workdir / "config.json").write_text('{"seed": 0}')
  lines = (json.dumps({"epoch": k}) + "\n" for k in range(records))
  (workdir / "metrics.jsonl").write_text("".join(lines))


def wait_until(condition):
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


@pytest.fixture
def workdir(tmp_path):
  folder = tmp_path / "run"
  folder.mkdir()
  return folder


def test_a_new_machine_gets_what_was_saved(address, workdir, tmp_path):
  with mirror.Mirror(address, workdir):
    for step in range(1, 5):
      save(workdir, step, records=step - 1)
      if step > 2:
        shutil.rmtree(workdir / "checkpoints" / str(step - 2))
  other = tmp_path / "other"
  other.mkdir()
  with mirror.Mirror(address, other):
    assert contents(other) == contents(workdir)
  with pytest.raises(errors.WorkdirError, match="holds no run"):
    mirror.fetch(f"{address}x", other)
  assert not os.path.exists(f"{address}x")
  fetched = tmp_path / "fetched"
  fetched.mkdir()
  mirror.fetch(address, fetched)
  assert contents(fetched) == contents(workdir)
  # As `load_model`, `--mode=eval` and the report take it.
  assert contents(mirror.local(address, "workdir")) == contents(workdir)
  # What no kept state has is gone there as here.
  store = mirror._Store(address)
  used = {d for state in store.states() for d in state.files.values()}
  assert store.names("files") == used
  assert len(store.names("states")) <= 2


@pytest.mark.parametrize("name", ["run::1", "zip::z", "file:x", "a b#?"])
def test_a_folder_may_have_any_name(tmp_path, monkeypatch, workdir, name):
  """Where fsspec would read a part of it as syntax."""
  monkeypatch.chdir(tmp_path)
  save(workdir, 4, 1)
  with mirror.Mirror(name, workdir):
    pass
  assert (tmp_path / name / "states").is_dir()
  assert contents(mirror.local(name, "WORKDIR")) == contents(workdir)


def test_what_a_run_starts_from_is_not_lost(workdir, tmp_path):
  """Converted weights, or those of init_from, whose source may be gone."""
  address = str(tmp_path / "disk")
  save(workdir, 0, records=0)
  with mirror.Mirror(address, workdir):
    pass
  other = tmp_path / "other"
  other.mkdir()
  with mirror.Mirror(address, other):
    pass
  assert contents(other) == contents(workdir)


def test_a_fill_that_was_killed_is_done_again(workdir, tmp_path):
  """The configuration is copied last, so its absence shows the kill."""
  address = str(tmp_path / "disk")
  save(workdir, 0, records=0)
  (workdir / "environment.json").write_text("{}")
  with mirror.Mirror(address, workdir):
    pass
  other = tmp_path / "other"
  other.mkdir()
  shutil.copytree(workdir / "checkpoints", other / "checkpoints")
  with mirror.Mirror(address, other):
    pass
  assert contents(other) == contents(workdir)


def test_what_is_ahead_is_left_alone_without_its_configuration(
  workdir, tmp_path
):
  """Somebody removed the configuration; newer records must stay."""
  address = str(tmp_path / "disk")
  save(workdir, 3, records=1)
  with mirror.Mirror(address, workdir):
    pass
  save(workdir, 9, records=5)
  (workdir / "config.json").unlink()
  with mirror.Mirror(address, workdir):
    pass
  assert mirror.progress(workdir) == [9, 5]


def test_what_is_ahead_is_left_alone(address, workdir, tmp_path):
  save(workdir, 3, records=1)
  with mirror.Mirror(address, workdir):
    pass
  other = tmp_path / "other"
  other.mkdir()
  save(other, 5, records=1)
  before = contents(other)
  with mirror.Mirror(address, other):
    assert contents(other) == before
  # And is what is there from then on.
  workdir_again = tmp_path / "again"
  workdir_again.mkdir()
  mirror.fetch(address, workdir_again)
  assert contents(workdir_again) == before


@pytest.mark.parametrize(
  "damage", [lambda b: b[:-1] + b"x", lambda b: b[:-1]], ids=["flip", "cut"]
)
def test_what_is_damaged_is_not_taken(
  address, workdir, tmp_path, caplog, damage
):
  with mirror.Mirror(address, workdir):
    save(workdir, 1, records=0)
    wait_until(mirror._Store(address).states)
    save(workdir, 2, records=1)
  store = mirror._Store(address)
  last, before = store.states()
  digest = last.files["checkpoints/2/state/array"]
  store.write(f"files/{digest}", damage(store.read(f"files/{digest}")))
  other = tmp_path / "other"
  other.mkdir()
  mirror.fetch(address, other)
  assert mirror.progress(other) == before.progress == [1, 0]
  assert f"state {last.number} of" in caplog.text
  for digest in before.files.values():
    store.remove(f"files/{digest}")
  shutil.rmtree(other)
  other.mkdir()
  with pytest.raises(errors.WorkdirError, match="holds no undamaged state"):
    mirror.fetch(address, other)
  assert not contents(other)


@pytest.mark.parametrize("is_listed", [True, False])
def test_half_a_file_is_written_again(workdir, tmp_path, is_listed):
  """A damaged state, which is trained again, or a kill leaves half a file."""
  address = str(tmp_path / "disk")
  save(workdir, 1, records=0)
  with mirror.Mirror(address, workdir):
    wait_until(mirror._Store(address).states)
    save(workdir, 2, records=1)
  store = mirror._Store(address)
  last, _ = store.states()
  digest = last.files["checkpoints/2/state/array"]
  store.write(f"files/{digest}", b"half")
  other = tmp_path / "other"
  other.mkdir()
  if not is_listed:
    (name, *_) = sorted(store.names("states"), reverse=True)
    store.remove(f"states/{name}")
  with mirror.Mirror(address, other):
    assert mirror.progress(other) == [1, 0]
    save(other, 2, records=1)
  again = tmp_path / "again"
  again.mkdir()
  mirror.fetch(address, again)
  assert contents(again) == contents(workdir)


@pytest.mark.parametrize("file", ["state/array", "manifest.json"])
@pytest.mark.parametrize("damage", [lambda b: b.replace(b"1", b"2"), None])
def test_a_checkpoint_that_is_damaged_here_stays_good_there(
  workdir, tmp_path, caplog, file, damage
):
  """Each start copies the workdir at its end, also one that is refused."""
  address = str(tmp_path / "disk")
  for step in (0x31313131, 0x32323232):
    save(workdir, step, records=0)
  with mirror.Mirror(address, workdir):
    pass
  good, path = contents(workdir), workdir / "checkpoints" / "825307441" / file
  if damage is None:
    path.unlink()
  else:
    path.write_bytes(damage(path.read_bytes()))
  for _ in range(3):
    with mirror.Mirror(address, workdir):
      pass
  assert (
    f"not copied to the mirror: checkpoint {workdir}/checkpoints" in caplog.text
  )
  other = tmp_path / "other"
  other.mkdir()
  mirror.fetch(address, other)
  assert contents(other) == good
  # One that has no good copy there is left out.
  shutil.rmtree(tmp_path / "disk")
  shutil.rmtree(other)
  other.mkdir()
  with mirror.Mirror(address, workdir):
    pass
  mirror.fetch(address, other)
  assert checkpoint.steps(other) == [0x32323232]


def test_a_workdir_that_was_begun_anew_is_not_copied(workdir, tmp_path, caplog):
  """Another run, which does not use this mirror, began it anew."""
  address = str(tmp_path / "disk")
  taken = []
  save(workdir, 5, records=2)
  with mirror.Mirror(address, workdir, is_taken=lambda: bool(taken)):
    wait_until(mirror._Store(address).states)
    taken.append(True)
    shutil.rmtree(workdir)
    save(workdir, 1, records=0)
  states = mirror._Store(address).states()
  assert [state.progress for state in states] == [[5, 2]]
  assert f"another run may now use {workdir}" in caplog.text


@pytest.mark.parametrize(
  "is_restarted", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_a_file_that_is_gone_there_is_written_again(
  workdir, tmp_path, is_restarted
):
  """A bucket's rule may remove what is old, such as config.json."""
  address = str(tmp_path / "disk")
  store = mirror._Store(address)
  save(workdir, 1, records=0)
  with contextlib.ExitStack() as stack:
    stack.enter_context(mirror.Mirror(address, workdir))
    wait_until(store.states)
    store.remove(f"files/{store.states()[0].files['config.json']}")
    # Noticed at the next state, and written again though nothing changes.
    save(workdir, 1, records=1)
    wait_until(
      lambda: mirror._digests(store.states()[:1]) <= store.names("files")
    )
    store.remove(f"files/{store.states()[0].files['config.json']}")
    if is_restarted:
      stack.close()
      stack.enter_context(mirror.Mirror(address, workdir))
    for step in (2, 3):
      save(workdir, step, records=step - 1)
      wait_until(lambda: store.states()[0].progress[0] == step)  # noqa: B023
  other = tmp_path / "other"
  other.mkdir()
  mirror.fetch(address, other)
  assert contents(other) == contents(workdir)


def test_a_workdir_that_is_removed_during_a_copy_has_its_progress(
  server, workdir, tmp_path
):
  """Otherwise a new machine would take the state as one without progress."""
  address = str(tmp_path / "disk")
  store = mirror._Store(address)
  with mirror.Mirror(address, workdir):
    uploading = hold_upload(server, "state/array")  # The last one.
    save(workdir, 7, records=3)
    assert uploading.wait(60)
    (log,) = workdir.glob(".mirror-*/metrics.jsonl")
    log.unlink()  # As `rm -r` does; it is there already.
    server.recovered.set()
    wait_until(store.states)
  assert store.states()[-1].progress == [7, 3]


def test_a_mirror_is_read_while_its_run_goes_on(workdir, tmp_path, monkeypatch):
  """The run removes the files of the states that it has replaced."""
  address = str(tmp_path / "disk")
  save(workdir, 1, records=0)
  with mirror.Mirror(address, workdir):
    pass
  download = mirror._download

  def late(*arguments):
    monkeypatch.setattr(mirror, "_download", download)
    shutil.rmtree(workdir / "checkpoints" / "1")
    for step in (2, 3):
      save(workdir, step, records=step)
      with mirror.Mirror(address, workdir):
        pass
    return download(*arguments)

  monkeypatch.setattr(mirror, "_download", late)
  other = tmp_path / "other"
  other.mkdir()
  mirror.fetch(address, other)
  assert contents(other) == contents(workdir)


def test_a_copy_is_removed_when_a_command_ends_at_once(workdir, tmp_path):
  save(workdir, 1, records=0)
  with mirror.Mirror(str(tmp_path / "disk"), workdir):
    pass
  code = (
    "import sys; from resnet_flax.run import errors, mirror;"
    "print(mirror.local(sys.argv[1], 'workdir'), flush=True);"
    "errors.exit_with('no', 3)"
  )
  ended = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path / "disk")],
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 3, ended.stderr
  copy = ended.stdout.strip()
  assert copy
  assert not os.path.exists(copy)


@pytest.mark.parametrize(
  "content", [b"", b"{", b'{"time": 1e12}'], ids=["empty", "torn", "ahead"]
)
def test_an_owner_that_says_nothing_keeps_nobody_away(
  content, workdir, tmp_path, monkeypatch
):
  """It was killed as it wrote, or its clock was wrong."""
  address = str(tmp_path / "disk")
  store = mirror._Store(address)
  store.write("owner.json", content)
  save(workdir, 1, records=0)
  with mirror.Mirror(address, workdir):
    wait_until(store.states)
    monkeypatch.setattr(mirror, "_FRESH", 0.0)  # It looks at each step.
    store.write("owner.json", content)
    save(workdir, 2, records=1)
    wait_until(lambda: store.states()[0].progress[0] == 2)


@pytest.mark.parametrize(("age", "is_refused"), [(100, True), (140, False)])
def test_an_owner_counts_for_two_minutes(workdir, tmp_path, age, is_refused):
  store = mirror._Store(str(tmp_path / "disk"))
  owner = {"run": "x", "host": "other", "pid": 1, "time": time.time() - age}
  store.write("owner.json", json.dumps(owner).encode())
  save(workdir, 1, records=0)
  try:
    with mirror.Mirror(str(tmp_path / "disk"), workdir):
      assert not is_refused
  except errors.WorkdirError:
    assert is_refused


def test_another_machine_is_refused_while_the_first_is_there(
  address, workdir, tmp_path
):
  save(workdir, 1, records=0)
  with mirror.Mirror(address, workdir):
    store = mirror._Store(address)
    owner = json.loads(store.read("owner.json"))
    store.write("owner.json", json.dumps(owner | {"host": "other"}).encode())
    with (
      pytest.raises(
        errors.WorkdirError, match=r"in use by process \d+ on other"
      ),
      mirror.Mirror(address, tmp_path),
    ):
      pass
    # Its clock is ahead.
    soon = {"host": "other", "time": time.time() + 60}
    store.write("owner.json", json.dumps(owner | soon).encode())
    with (
      pytest.raises(errors.WorkdirError, match="last heard of 0 s ago"),
      mirror.Mirror(address, tmp_path),
    ):
      pass
    # It has not been heard of for long.
    store.write("owner.json", json.dumps(owner | {"time": 0}).encode())
    with mirror.Mirror(address, tmp_path):
      pass


@pytest.mark.parametrize("is_ahead", [False, True])
def test_another_run_is_refused_before_anything_is_changed(
  address, workdir, tmp_path, is_ahead
):
  save(workdir, 1, records=0)
  with mirror.Mirror(address, workdir):
    pass
  other = tmp_path / "other"
  other.mkdir()
  if is_ahead:
    save(other, 2, records=1)
  before = contents(other)

  def check(folder):
    raise errors.WorkdirError(f"{(folder / 'config.json').read_text()}!")

  def stop(folder):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt), mirror.Mirror(address, other, stop):
    pass
  assert mirror._Store(address).read("owner.json") is None
  with (
    pytest.raises(errors.WorkdirError, match=r"seed.*!"),
    mirror.Mirror(address, other, check),
  ):
    pass
  assert contents(other) == before
  store = mirror._Store(address)
  assert [state.progress for state in store.states()] == [[1, 0]]
  assert store.read("owner.json") is None
  with mirror.Mirror(address, workdir):
    pass
  # The address is of no state yet: any run may use it.
  with mirror.Mirror(f"{address}-new", other, check):
    pass


@pytest.mark.parametrize("num_torn", [1, 2])
def test_torn_lists_are_no_empty_mirror(workdir, tmp_path, num_torn):
  """A run that is killed while it writes its first list leaves one torn."""
  address = str(tmp_path / "disk")
  with mirror.Mirror(address, workdir):
    save(workdir, 1, records=0)
    wait_until(mirror._Store(address).states)
    if num_torn == 2:
      save(workdir, 2, records=1)
  store = mirror._Store(address)
  names, kept = store.names("states"), store.names("files")
  assert len(names) == num_torn
  for name in names:
    store.write(f"states/{name}", b"{")
  # Where the run still has its workdir, it writes later ones.
  shutil.copytree(tmp_path / "disk", tmp_path / "other_disk")
  save(workdir, 3, records=1)
  with mirror.Mirror(str(tmp_path / "other_disk"), workdir):
    pass
  assert mirror._Store(str(tmp_path / "other_disk")).states()
  other = tmp_path / "other"
  other.mkdir()
  if num_torn == 1:
    with mirror.Mirror(address, other):
      save(other, 1, records=0)
    assert len(store.states()) == 1
    return
  with (
    pytest.raises(errors.WorkdirError, match="holds no undamaged state"),
    mirror.Mirror(address, other),
  ):
    pass
  assert store.names("files") == kept
  with pytest.raises(
    errors.WorkdirError, match=r"^workdir=.* holds no undamaged .* address\.$"
  ):
    mirror.fetch(address, other, "workdir")


def test_a_copy_that_is_read_is_of_the_latest_state(workdir, tmp_path):
  address = str(tmp_path / "disk")
  for step in (1, 2):
    with mirror.Mirror(address, workdir):
      save(workdir, step, records=0)
    copies = [mirror.local(address, "workdir") for _ in range(2)]
    assert copies[0] == copies[1]
    assert mirror.progress(copies[0]) == [step, 0]


@pytest.mark.parametrize(
  ("url", "message"),
  [
    ("nosuch://bucket/run", "cannot be used"),
    ("/dev/null/run", "cannot be used: NotADirectoryError"),
  ],
)
def test_an_address_out_of_reach_is_an_error_at_the_start(
  url, message, workdir
):
  with (
    pytest.raises(errors.UserError, match=message),
    mirror.Mirror(url, workdir),
  ):
    pass


# ---- Servers that are ill

ILLNESSES = {
  "forbids": PermissionError("Forbidden"),  # 403 of S3.
  "is unavailable": OSError("503, Service Unavailable"),
  "is full": OSError(errno.ENOSPC, "No space left on device"),
  "has no room": OSError("507, Insufficient Storage"),
  "is away": ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
  "hangs": None,
}


@pytest.fixture
def server(monkeypatch):
  """Serves a folder; `asked` lists requests, `ill` is called before each."""
  server = types.SimpleNamespace(ill=lambda: None, asked=[])
  server.recovered = threading.Event()

  def answer(system, *arguments, method):
    server.asked.append((method.__name__, *arguments))
    server.ill()
    return method(system, *arguments)

  for name in (
    *("ls", "cat_file", "pipe_file", "rm_file", "put_file", "get_file"),
  ):
    method = getattr(LocalFileSystem, name)
    partial = functools.partialmethod(answer, method=method)
    monkeypatch.setattr(LocalFileSystem, name, partial)
  monkeypatch.setattr(mirror, "_POLL", 0.05)
  monkeypatch.setattr(mirror, "_MOST_PATIENCE", 0.1)
  yield server
  server.recovered.set()


def fall_ill(server, illness, monkeypatch):
  """From now on it does not answer as it should, until it has recovered."""

  def ill():
    if error := ILLNESSES[illness]:
      if not server.recovered.is_set():
        raise error
    else:
      server.recovered.wait()

  monkeypatch.setattr(mirror, "_ANSWER", 0.2)
  monkeypatch.setattr(mirror, "_TRANSFER", 0.2)
  server.ill = ill


def hold_upload(server, ending=""):
  """An event: a file whose path ends so is copied, until it has recovered."""
  uploading = threading.Event()

  def slow():
    name, path, *_ = server.asked[-1]
    if name == "put_file" and path.endswith(ending):
      uploading.set()
      server.recovered.wait()

  server.ill = slow
  return uploading


@pytest.mark.parametrize("illness", ILLNESSES)
def test_a_server_that_is_ill_for_a_while(
  server, illness, workdir, tmp_path, caplog, monkeypatch
):
  """Warns once, tries again, and has all in the end."""
  caplog.set_level(logging.INFO)
  address = tmp_path / "disk"
  with mirror.Mirror(str(address), workdir):
    fall_ill(server, illness, monkeypatch)
    save(workdir, 1, records=0)
    wait_until(lambda: "cannot be written" in caplog.text)
    count = len(server.asked)
    save(workdir, 2, records=1)
    wait_until(lambda: len(server.asked) > count + 1)  # It is tried again.
    assert caplog.text.count("cannot be written") == 1
    server.recovered.set()
  error = ILLNESSES[illness] or "TimeoutError: no answer for 0.2 s"
  assert str(error) in caplog.text
  assert "is up to date again" in caplog.text
  other = tmp_path / "other"
  other.mkdir()
  mirror.fetch(str(address), other)
  assert contents(other) == contents(workdir)


@pytest.mark.slow
def test_an_s3_server_that_is_stopped_for_a_while(
  workdir, tmp_path, caplog, monkeypatch
):
  caplog.set_level(logging.INFO, "resnet_flax")
  server = start_s3(monkeypatch)
  _, port = server.get_host_and_port()
  address = f"s3://bucket/runs/{tmp_path.name}"
  with mirror.Mirror(address, workdir):
    server.stop()
    save(workdir, 1, records=0)
    wait_until(lambda: "cannot be written" in caplog.text)
    server = start_s3(monkeypatch, port)
  assert "is up to date again" in caplog.text
  other = tmp_path / "other"
  other.mkdir()
  mirror.fetch(address, other)
  assert contents(other) == contents(workdir)
  server.stop()


@pytest.mark.parametrize("illness", ILLNESSES)
def test_a_server_that_is_ill_at_the_start_is_an_error(
  server, illness, workdir, tmp_path, monkeypatch
):
  fall_ill(server, illness, monkeypatch)
  with (
    pytest.raises(
      errors.WorkdirError, match=r"disk cannot be used: \w+Error: "
    ),
    mirror.Mirror(str(tmp_path / "disk"), workdir),
  ):
    pass
  assert not contents(workdir)


@pytest.mark.parametrize("is_stopped", [False, True])
@pytest.mark.parametrize("illness", ["is away", "hangs"])
def test_the_end_does_not_wait_for_ever(
  server, illness, is_stopped, workdir, tmp_path, caplog, monkeypatch
):
  limits = "_AT_THE_END", "_WHEN_STOPPED"
  monkeypatch.setattr(mirror, limits[is_stopped], 0.5)
  monkeypatch.setattr(mirror, limits[not is_stopped], "not of this end")
  with (
    contextlib.suppress(KeyboardInterrupt),
    mirror.Mirror(str(tmp_path / "disk"), workdir),
  ):
    fall_ill(server, illness, monkeypatch)
    save(workdir, 1, records=0)
    if is_stopped:
      raise KeyboardInterrupt
  assert f"lacks the latest files; they are only in {workdir}" in caplog.text


@pytest.mark.parametrize("can_link", [True, False])
def test_a_slow_server_gets_what_is_removed_meanwhile(
  server, workdir, tmp_path, monkeypatch, can_link
):
  """A checkpoint may last less long than its copying."""
  if not can_link:
    refuse = mock.Mock(side_effect=OSError(errno.EPERM, "not permitted"))
    monkeypatch.setattr(pathlib.Path, "hardlink_to", refuse)
  address = str(tmp_path / "disk")
  store = mirror._Store(address)
  with mirror.Mirror(address, workdir):
    uploading = hold_upload(server)
    save(workdir, 1, records=1)
    assert uploading.wait(60)
    before = contents(workdir)
    shutil.rmtree(workdir / "checkpoints" / "1")
    save(workdir, 2, records=2)
    server.recovered.set()
    wait_until(lambda: len(store.states()) == 2)
  last, first = store.states()
  assert first.progress == [1, 1]
  assert last.progress == [2, 2]
  mirrored = {
    name: store.read(f"files/{digest}") for name, digest in first.files.items()
  }
  assert mirrored == {k: v for k, v in before.items() if k in first.files}
  assert set(mirrored) >= {"metrics.jsonl", "checkpoints/1/state/array"}
  assert not list(workdir.glob(".mirror-*"))


def test_training_goes_on_while_a_server_hangs(
  server, tiny_config, tmp_path, caplog, monkeypatch
):
  monkeypatch.setattr(mirror, "_AT_THE_END", 0.5)
  config = changed(tiny_config, num_epochs=1)
  config.checkpoint.mirror = str(tmp_path / "disk")
  hang = functools.partial(fall_ill, server, "hangs", monkeypatch)
  records = train.train_and_evaluate(
    config, tmp_path / "run", on_event=at_event("step", 1, hang)
  )
  assert len(records) == 1
  assert "lacks the latest files" in caplog.text


def test_it_is_heard_of_while_it_copies(server, workdir, tmp_path, monkeypatch):
  """Large files on slow servers take longer than an owner's claim lasts."""
  monkeypatch.setattr(mirror, "_FRESH", 0.0)
  save(workdir, 1, records=0)
  with mirror.Mirror(str(tmp_path / "disk"), workdir):
    pass
  copied = [
    "beat" if "owner.json" in arguments[0] else name
    for name, *arguments in server.asked
    # A thread of an earlier test may not have ended yet.
    if name in ("put_file", "pipe_file") and str(tmp_path) in arguments[0]
  ]
  # A beat before each of five files.
  turns = [kind for kind, _ in itertools.groupby(copied)]
  assert turns[:10] == ["beat", "put_file"] * 5


def test_a_run_that_is_taken_over_copies_nothing_more(
  workdir, tmp_path, caplog, monkeypatch
):
  monkeypatch.setattr(mirror, "_FRESH", 5 * mirror._POLL)
  address = str(tmp_path / "disk")
  store = mirror._Store(address)
  with mirror.Mirror(address, workdir):
    owner = json.loads(store.read("owner.json")) | {"run": "another"}
    store.write("owner.json", json.dumps(owner).encode())
    wait_until(lambda: "another run has taken over" in caplog.text)
    save(workdir, 1, records=0)
  assert not store.states()
  assert json.loads(store.read("owner.json")) == owner


@pytest.mark.parametrize("code", [403, 503, 507])
@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_what_the_libraries_make_of_a_servers_errors(
  kind, code, workdir, monkeypatch, caplog
):
  """The error is one line, whatever else the library says."""
  pytest.importorskip({"s3": "s3fs", "gs": "gcsfs"}[kind])

  class Refuse(http.server.BaseHTTPRequestHandler):
    def answer(self):
      self.rfile.read(int(self.headers.get("Content-Length", 0)))
      self.send_response(code)
      self.send_header("Content-Length", "0")
      self.end_headers()

    do_GET = do_PUT = do_POST = do_HEAD = answer

    def log_message(self, *_):
      pass

  monkeypatch.setattr(mirror, "_ANSWER", 5.0)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
    url = f"http://127.0.0.1:{server.server_port}"
    for name, value in {**AWS, "AWS_ENDPOINT_URL": url}.items():
      monkeypatch.setenv(name, value)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with (
      pytest.raises(errors.WorkdirError, match=r"cannot be used: \w+Error: "),
      mirror.Mirror(f"{kind}://bucket/run", workdir),
    ):
      pass
    message = rf"^--from={kind}://bucket/run cannot be used: "
    with pytest.raises(errors.WorkdirError, match=message):
      mirror.local(f"{kind}://bucket/run", "--from")
    server.shutdown()
  assert "Traceback" not in caplog.text


def test_names_in_a_list_lead_nowhere_else(workdir, tmp_path):
  """Anybody may have written what is in a bucket."""
  save(workdir, 1, records=0)
  address = str(tmp_path / "disk")
  with mirror.Mirror(address, workdir):
    pass
  store = mirror._Store(address)
  (state,) = store.states()
  files = {"../stolen": state.files["config.json"]}
  raw = {"number": 9, "progress": [9, 9], "files": files}
  bad = json.dumps(raw).encode()
  store.write(f"states/{mirror._state_name(9, bad)}", bad)
  other = tmp_path / "other" / "run"
  other.mkdir(parents=True)
  mirror.fetch(address, other)
  assert contents(other) == contents(workdir)
  assert os.listdir(tmp_path / "other") == ["run"]


@pytest.mark.slow
def test_killed_with_its_disk_at_any_moment(address, tmp_path):
  """The same command on a new machine ends bit-identical to its twin."""
  workdir = tmp_path / "run"
  # Everybody has folders; who has the servers has time.
  kills, epochs = (20, 120) if "://" in address else (2, 40)

  def command(workdir, *more):
    return [
      *(sys.executable, "-m", "resnet_flax.main", f"--workdir={workdir}"),
      *("--config=configs/quickstart.py", f"--config.num_epochs={epochs}"),
      *("--config.dataset.train_examples=80", "--config.batch_size=16"),
      *("--config.model.depth=8", "--config.model.num_filters=4"),
      *("--config.checkpoint.every_steps=3", *more),
    ]

  subprocess.run(command(tmp_path / "twin"), cwd=ROOT, check=True)
  killed = command(workdir, f"--config.checkpoint.mirror={address}")
  store = mirror._Store(address)
  rng = random.Random(1)  # The first kill is early, the last one is not.
  for kill in range(kills):
    with subprocess.Popen(
      killed, cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
      if is_early := rng.random() < 0.3:
        time.sleep(rng.uniform(0, 4))
      else:
        assert any("compiled in" in line for line in process.stderr)
        # Whatever the machine, the last kill finds a mirrored checkpoint.
        if kill == kills - 1:
          wait_until(lambda: any(s.progress[0] > 0 for s in store.states()))
        time.sleep(rng.uniform(0, 2.5))
      process.kill()
    assert process.returncode == -signal.SIGKILL
    here = mirror.progress(workdir)
    there = [state.progress for state in store.states()]
    print("early" if is_early else "training", here, there, flush=True)
    shutil.rmtree(workdir, ignore_errors=True)
  ended = subprocess.run(
    killed, cwd=ROOT, check=True, stderr=subprocess.PIPE, text=True
  )
  assert f"filled {workdir} from {address}" in ended.stderr
  config = folder.load_config(workdir)
  assert_same_run(config, workdir, tmp_path / "twin")
