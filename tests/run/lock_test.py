import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from resnet_flax.run import errors, lock

HOLD = """
import pathlib, sys, time
from resnet_flax import lock
with lock.exclusive(pathlib.Path(sys.argv[1])):
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
  with lock.exclusive(tmp_path):
    owner = json.loads((tmp_path / "lock").read_text())
    assert owner["pid"] == os.getpid()
  assert list(tmp_path.iterdir()) == []
  with lock.exclusive(tmp_path):
    pass


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path, holder):
  owner = json.loads((tmp_path / "lock").read_text())
  assert owner["pid"] == holder.pid
  with (
    pytest.raises(errors.WorkdirError) as caught,
    lock.exclusive(tmp_path),
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
  with lock.exclusive(tmp_path):
    owner = json.loads((tmp_path / "lock").read_text())
    assert owner["pid"] == os.getpid()
  assert f"taking over the lock of process {holder.pid}" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00\xff"])
def test_a_damaged_stale_lock_is_taken_over(tmp_path, text):
  (tmp_path / "lock").write_text(text)
  with lock.exclusive(tmp_path):
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks_is_warned_about(
  tmp_path, monkeypatch, caplog
):
  def flock(*arguments):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(lock.fcntl, "flock", flock)
  with lock.exclusive(tmp_path):
    pass
  assert "cannot be locked (Operation not supported)" in caplog.text


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EIO])
def test_a_lock_that_cannot_be_had_for_other_reasons_is_refused(
  tmp_path, monkeypatch, number
):
  def flock(*arguments):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(lock.fcntl, "flock", flock)
  with (
    pytest.raises(errors.WorkdirError, match="lock cannot be locked"),
    lock.exclusive(tmp_path),
  ):
    pass
