"""Becomes the process of a cell: tied to its Ray worker, on cores of its own.

  python -m experiments.tools.sweep.launch PARENT CPUS -m resnet_flax.main ...

Everything is set in a fresh process, which then turns into the program: code
between fork and exec is not safe in a worker with threads.
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
  """The system sends SIGTERM when the parent dies, in whatever way.

  So no cell is left behind that a retry would meet; it saves as at any
  SIGTERM. Only Linux can; elsewhere the retry is refused by the workdir's lock.

  Args:
    parent: the process that started this one.
  """
  if sys.platform != "linux":
    return
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
    raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
  if os.getppid() != parent:  # It died before.
    sys.exit(128 + signal.SIGTERM)


def take_cores(count: int, folder: pathlib.Path) -> None:
  """Keeps this process on so many cores that no other cell is on.

  XLA starts as many threads as there are cores that it may use, so two cells
  at once would otherwise both use all. A core is taken by locking a file,
  until the program ends, which the open file outlives this function for.

  Args:
    count: how many cores. With all of them, nothing is done.
    folder: holds a file for each core; the same for all cells of a machine.
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
    f"warning: fewer than {count} cores are free of other sweeps, so this cell"
    " is not kept to cores of its own",
    file=sys.stderr,
  )


def main() -> None:
  """Sets the process up and becomes the program."""
  parent, cpus, *arguments = sys.argv[1:]
  # Ray's workers are started with SIGINT blocked.
  signal.pthread_sigmask(signal.SIG_SETMASK, ())
  end_with_parent(int(parent))
  name = f"resnet_flax-cores-{os.getuid()}"
  take_cores(int(cpus), pathlib.Path(tempfile.gettempdir(), name))
  os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
  main()
