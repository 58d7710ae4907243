"""A run that outlives its machine; servers of clouds are emulated here."""

import contextlib
import json
import logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from resnet_flax.run import errors, mirror

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(params=["folder", "s3", "gs"])
def address(request, tmp_path, monkeypatch):
  """An empty address of each kind, on a server of this machine."""
  if request.param == "folder":
    yield str(tmp_path / "disk" / "run")
    return
  if request.param == "s3":
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
      "AWS_ENDPOINT_URL": url,
      "AWS_ACCESS_KEY_ID": "test",
      "AWS_SECRET_ACCESS_KEY": "test",
      "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
      monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="bucket")
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
  (folder / "state").mkdir(parents=True)
  (folder / "state" / "array").write_bytes(step.to_bytes(4, "big") * 1000)
  (folder / "manifest.json").write_text("{}")
  (workdir / "config.json").write_text('{"seed": 0}')
  lines = (json.dumps({"epoch": k}) + "\n" for k in range(records))
  (workdir / "metrics.jsonl").write_text("".join(lines))


def content(workdir):
  return {
    str(path.relative_to(workdir)): path.read_bytes()
    for path in sorted(workdir.rglob("*"))
    if path.is_file()
  }


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
    assert content(other) == content(workdir)
  with pytest.raises(errors.WorkdirError, match="holds no run"):
    mirror.fetch(f"{address}x", other)
  assert not os.path.exists(f"{address}x")
  fetched = tmp_path / "fetched"
  fetched.mkdir()
  mirror.fetch(address, fetched)
  assert content(fetched) == content(workdir)
  # As `load_model`, `--mode=eval` and the report take it.
  assert content(mirror.local(address, "workdir")) == content(workdir)
  # What no kept state has is gone there as here.
  store = mirror._Store(address)
  used = {d for state in store.states() for d in state.files.values()}
  assert store.names("files") == used
  assert len(store.names("states")) <= 2


def test_what_is_ahead_is_left_alone(address, workdir, tmp_path):
  save(workdir, 3, records=1)
  with mirror.Mirror(address, workdir):
    pass
  other = tmp_path / "other"
  other.mkdir()
  save(other, 5, records=1)
  before = content(other)
  with mirror.Mirror(address, other):
    assert content(other) == before
  # And is what is there from then on.
  workdir_again = tmp_path / "again"
  workdir_again.mkdir()
  mirror.fetch(address, workdir_again)
  assert content(workdir_again) == before


def test_a_flipped_byte_is_not_taken(address, workdir, tmp_path, caplog):
  with mirror.Mirror(address, workdir):
    save(workdir, 1, records=0)
    time.sleep(3 * mirror._POLL)
    save(workdir, 2, records=1)
  store = mirror._Store(address)
  last, before = store.states()
  digest = last.files["checkpoints/2/state/array"]
  store.write(f"files/{digest}", store.read(f"files/{digest}")[:-1] + b"x")
  other = tmp_path / "other"
  other.mkdir()
  mirror.fetch(address, other)
  assert mirror.progress(other) == before.progress == (1, 0)
  assert f"state {last.number} of" in caplog.text
  for digest in before.files.values():
    store.remove(f"files/{digest}")
  shutil.rmtree(other)
  other.mkdir()
  with pytest.raises(errors.WorkdirError, match="holds no state"):
    mirror.fetch(address, other)
  assert not content(other)


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
    # It has not been heard of for long.
    store.write("owner.json", json.dumps(owner | {"time": 0}).encode())
    with mirror.Mirror(address, tmp_path):
      pass


def test_another_run_is_refused_before_anything_is_changed(
  address, workdir, tmp_path
):
  save(workdir, 1, records=0)
  with mirror.Mirror(address, workdir):
    pass
  other = tmp_path / "other"
  other.mkdir()

  def check(folder):
    raise errors.WorkdirError(f"{(folder / 'config.json').read_text()}!")

  with (
    pytest.raises(errors.WorkdirError, match=r"seed.*!"),
    mirror.Mirror(address, other, check),
  ):
    pass
  assert not content(other)


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


def test_a_server_that_is_away_for_a_while(workdir, tmp_path, caplog):
  """Training hears a warning, once; then all is there."""
  caplog.set_level(logging.INFO)
  address = tmp_path / "disk"
  with mirror.Mirror(str(address), workdir):
    (address / "states").write_text("no folder")
    save(workdir, 1, records=0)
    time.sleep(4 * mirror._POLL)
    assert caplog.text.count("cannot be written") == 1
    (address / "states").unlink()
  assert "is up to date again" in caplog.text
  other = tmp_path / "other"
  other.mkdir()
  mirror.fetch(str(address), other)
  assert content(other) == content(workdir)


def test_a_run_that_is_stopped_does_not_wait_for_ever(
  workdir, tmp_path, caplog, monkeypatch
):
  monkeypatch.setattr(mirror, "_WHEN_STOPPED", 0.5)
  address = tmp_path / "disk"
  with (
    contextlib.suppress(KeyboardInterrupt),
    mirror.Mirror(str(address), workdir),
  ):
    (address / "states").write_text("no folder")
    save(workdir, 1, records=0)
    raise KeyboardInterrupt
  assert f"lacks what was saved last; it is in {workdir} alone" in caplog.text


def test_names_in_a_list_lead_nowhere_else(workdir, tmp_path):
  """Anybody may have written what is in a bucket."""
  save(workdir, 1, records=0)
  address = str(tmp_path / "disk")
  with mirror.Mirror(address, workdir):
    pass
  store = mirror._Store(address)
  (state,) = store.states()
  files = {"../stolen": state.files["config.json"]}
  raw = {"number": 9, "step": 9, "records": 9, "files": files}
  bad = json.dumps(raw).encode()
  store.write(f"states/{mirror._state_name(bad)}", bad)
  other = tmp_path / "other" / "run"
  other.mkdir(parents=True)
  mirror.fetch(address, other)
  assert content(other) == content(workdir)
  assert os.listdir(tmp_path / "other") == ["run"]


@pytest.mark.slow
def test_killed_with_its_disk_at_any_moment(tmp_path):
  """The same command on a new machine ends in the bits of its twin."""

  def command(name, *more):
    return [
      *(sys.executable, "-m", "resnet_flax.main"),
      *("--config=configs/quickstart.py", "--config.num_epochs=6"),
      *("--config.dataset.train_examples=640", "--config.model.depth=8"),
      *("--config.model.num_filters=4", "--config.checkpoint.every_steps=3"),
      *(f"--workdir={tmp_path / name}", *more),
    ]

  def metrics(name):
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    timed = ("epoch_seconds", "images_per_second")
    return [
      {k: v for k, v in json.loads(line).items() if k not in timed}
      for line in lines
    ]

  subprocess.run(command("twin"), cwd=ROOT, check=True)
  killed = command("run", f"--config.checkpoint.mirror={tmp_path / 'disk'}")
  rng = random.Random(0)
  for _ in range(10):
    with subprocess.Popen(killed, cwd=ROOT) as process:
      try:
        process.wait(rng.uniform(6, 14))
      except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
      else:
        assert process.returncode == 0
        break
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
  else:
    subprocess.run(killed, cwd=ROOT, check=True)
  assert metrics("run") == metrics("twin")
