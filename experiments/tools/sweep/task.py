"""What a Ray worker does with a cell. Imports little: workers start often."""

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

from resnet_flax.run import errors, folder

STARTED = "sweep: started on "
# A cell whose worker died needs a step and a save to end.
_WAIT_SECONDS = 120.0
# Seconds until an interrupt is noticed.
_INTERVAL = 0.5
_STOP_CODES = (128 + signal.SIGINT, 128 + signal.SIGTERM)


class Died(Exception):
  """The cell's process was ended from outside: to be tried again."""


def run(
  arguments: Sequence[str],
  workdir: pathlib.Path,
  log: pathlib.Path,
  cwd: pathlib.Path,
  cpus: int,
  gpus: int,
) -> int:
  """Runs the main command for one cell until it ends.

  If it is interrupted, as `ray.cancel` does, the process is asked to stop, and
  its end is waited for.

  Args:
    arguments: of `resnet_flax.main`, without the workdir.
    workdir: of the cell.
    log: is added to: when it was started, and what it writes.
    cwd: the repository's top folder.
    cpus: how many cores it may use.
    gpus: how many GPUs Ray has given; they are in the environment.

  Returns:
    The exit code.

  Raises:
    Died: a signal ended it that was not asked for here.
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
      # Ctrl-C on the terminal is passed on once, by the sweep.
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
  """Inside, `ray.cancel` sets the event, at whatever moment it comes.

  An exception could come before the process that was started is known.
  """
  event = threading.Event()
  before = signal.signal(signal.SIGINT, lambda *_: event.set())
  try:
    yield event
  finally:
    signal.signal(signal.SIGINT, before)


def _wait_for_lock(workdir: pathlib.Path) -> None:
  """Waits until the process of an attempt before has left the workdir.

  If it does not in time, the cell itself says who has it.
  """
  end = time.monotonic() + _WAIT_SECONDS
  while workdir.is_dir() and time.monotonic() < end:
    with contextlib.suppress(errors.WorkdirError), folder.exclusive(workdir):
      return
    time.sleep(0.2)
