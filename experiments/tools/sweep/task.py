"""Runs a cell in a Ray worker; imports little, since workers start often."""

import contextlib
import datetime
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from resnet_flax.run import errors, folder, signals

STARTED = "sweep: started on "
# A cell whose worker died finishes its step and saves before it ends.
_WAIT_SECONDS = 120.0
# Seconds until the worker notices an interrupt.
_INTERVAL = 0.5
_STOP_CODES = tuple(128 + number for number in signals.SIGNALS)


class Died(Exception):
  """The cell's process was killed from outside and must be started again."""


def run(
  arguments: Sequence[str],
  workdir: pathlib.Path,
  log: pathlib.Path,
  cwd: pathlib.Path,
  cpus: int,
  gpus: int,
) -> int:
  """Runs the main command for one cell until it ends; gives the exit code.

  The start time and the process's output are added to `log`. Ray has put the
  assigned GPUs into the environment. On an interrupt, for example by
  `ray.cancel`, it asks the process to stop and waits for its end. Raises `Died`
  if a signal from outside ended the process.
  """
  _wait_for_lock(workdir)
  environ = dict(os.environ)
  if not gpus:
    environ["CUDA_VISIBLE_DEVICES"] = ""
  command = [
    *(sys.executable, "-m", "experiments.tools.sweep.launch"),
    *(str(os.getpid()), str(cpus), "-m", "resnet_flax.main"),
    *(*arguments, f"--workdir={workdir}"),
  ]
  now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
  with log.open("a") as file, _interrupts() as stop:
    print(f"{STARTED}{socket.gethostname()} at {now}", file=file, flush=True)
    process = subprocess.Popen(
      command,
      cwd=cwd,
      env=environ,
      stdin=subprocess.DEVNULL,
      stdout=file,
      stderr=subprocess.STDOUT,
      # The sweep passes Ctrl-C on, so the terminal must not send it, too.
      start_new_session=True,
    )
    asked = False
    while process.poll() is None:
      if stop.is_set() and not asked:
        asked = True
        process.terminate()
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_INTERVAL)
  code = process.returncode
  if not asked and (code < 0 or code in _STOP_CODES):
    number = -code if code < 0 else code - 128
    raise Died(f"killed by {signal.Signals(number).name}")
  return code


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
  """Makes `ray.cancel` set an event instead of raising an exception.

  An exception could come before the started process is known.
  """
  event = threading.Event()
  before = signal.signal(signal.SIGINT, lambda *_: event.set())
  try:
    yield event
  finally:
    signal.signal(signal.SIGINT, before)


def _wait_for_lock(workdir: pathlib.Path) -> None:
  """Waits until the process of an earlier attempt has left the workdir.

  If it takes too long, the cell's own error names the process.
  """
  end = time.monotonic() + _WAIT_SECONDS
  while workdir.is_dir() and time.monotonic() < end:
    with contextlib.suppress(errors.WorkdirError), folder.exclusive(workdir):
      return
    time.sleep(0.2)
