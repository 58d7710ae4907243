"""Starts a cell's program, tied to its Ray worker, on its own cores.

  python -m experiments.tools.sweep.launch PARENT CPUS -m resnet_flax.main ...

Code between fork and exec is not safe in a worker with threads. So a fresh
process sets everything up and then becomes the program.
"""

import ctypes
import fcntl
import os
import pathlib
import signal
import sys
import tempfile

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
  """Asks Linux to send this process SIGTERM when its parent dies.

  The cell then saves and ends, so that it does not block a retry. On other
  systems the workdir's lock refuses the retry.
  """
  if sys.platform != "linux":
    return
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
    raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
  if os.getppid() != parent:  # The parent has died already.
    sys.exit(128 + signal.SIGTERM)


def take_cores(count: int, folder: pathlib.Path) -> None:
  """Restricts this process to `count` cores that no other cell uses.

  XLA starts a thread for each core that it may use, so two cells at once would
  both use all cores. All cells of a machine share `folder`. A locked file in it
  reserves a core, and stays open until the program ends. Nothing is done if
  this process may use only `count` cores or fewer.
  """
  if sys.platform != "linux":
    return
  cores = sorted(os.sched_getaffinity(0))
  if count >= len(cores):
    return
  folder.mkdir(mode=0o700, exist_ok=True)
  taken: dict[int, int] = {}
  for core in cores:
    file = os.open(folder / str(core), os.O_RDWR | os.O_CREAT, 0o600)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(file)
      continue
    taken[core] = file
    if len(taken) == count:
      os.sched_setaffinity(0, taken)
      for file in taken.values():
        os.set_inheritable(file, True)
      return
  for file in taken.values():
    os.close(file)
  print(
    f"warning: other sweeps leave fewer than {count} cores free, so this cell"
    " may share cores with them",
    file=sys.stderr,
  )


def main() -> None:
  """Sets up the process and becomes the program."""
  parent, cpus, *arguments = sys.argv[1:]
  # Ray's workers are started with SIGINT blocked.
  signal.pthread_sigmask(signal.SIG_SETMASK, ())
  end_with_parent(int(parent))
  name = f"resnet_flax-cores-{os.getuid()}"
  take_cores(int(cpus), pathlib.Path(tempfile.gettempdir(), name))
  os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
  main()
