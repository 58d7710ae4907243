"""The processes that decode images, which Grain starts."""

import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

from resnet_flax.run import errors

# Why a worker may have ended, by a signal and by itself.
_KILLED = (
  "The system does that most likely for want of memory: pass a smaller"
  " --config.dataset.num_workers."
)
_NO_GUARD = (
  "A script must train under: if __name__ == '__main__'; otherwise see what the"
  " process says above, or set dataset.num_workers=0."
)


class Workers:
  """The processes that Grain starts for an iterator.

  For one that is killed amid handing over Grain waits for ever: its pipe has an
  end in this process, too.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    self._folder, self._others = folder, set(multiprocessing.active_children())
    self._own: set[multiprocessing.process.BaseProcess] = set()

  def next_of(self, iterator: Iterator[Any]) -> Any:
    """What comes next; `DataError` if a worker was killed."""
    result: futures.Future[Any] = futures.Future()

    def take() -> None:
      try:
        result.set_result(next(iterator))
      except Exception as error:
        result.set_exception(error)

    threading.Thread(target=take, name="next images", daemon=True).start()
    while futures.wait([result], 0.2).not_done and not self._died():
      pass
    # Often enough for none to end unseen.
    died = self._died()
    error = result.exception() if result.done() else None
    # What Grain itself says of one.
    if error and "terminated unexpectedly" in str(error):
      died = died or errors.one_line(error)
    if result.done() and not (error and died):
      return result.result()
    raise errors.DataError(
      f"a process that decodes images of {self._folder} was ended ({died}). "
      + (_KILLED if "code -" in died else _NO_GUARD)
    ) from error

  def _died(self) -> str:
    self._own |= {
      child
      for child in multiprocessing.active_children()
      if child.name.startswith("grain-process-prefetch")
    } - self._others
    codes = [worker.exitcode for worker in self._own if worker.exitcode]
    return f"exit code {codes[0]}" if codes else ""

  def close(self, iterator: Any) -> None:
    """Ends all of them, and the iterator."""
    if not self._died():
      iterator.close()
    else:  # To close it would wait for those that died.
      for worker in self._own:
        worker.kill()


def check_semaphores() -> None:
  """Checks that processes, which have some between them, can be started."""
  try:
    multiprocessing.Semaphore()
  except OSError as error:
    raise errors.DataError(
      "processes that decode images cannot be started, as there can be no"
      f" semaphore in /dev/shm ({error.strerror}). Make it writable and free"
      " some room there, or set dataset.num_workers=0."
    ) from error


def import_grain() -> Any:
  """Grain, where it is needed: it takes a second or two."""
  from absl import flags

  try:
    import grain
  except ImportError:
    message = "need Grain: pip install 'resnet_flax[streaming]'."
    raise errors.DataError(f"images that are streamed {message}") from None
  # It reads flags of its own, which absl refuses where none have been parsed,
  # as in a notebook. This lets them have their defaults.
  for name in flags.FLAGS:
    if name.startswith("grain_"):
      flags.FLAGS[name].present = 1
  return grain


def start(ignored: Sequence[signal.Signals], index: int, count: int) -> None:
  """Ties a worker to the process that it works for, which signals stop."""
  # Ctrl-C and schedulers signal all processes of a job. The parent decides
  # when to stop, and still needs batches for its last step.
  for number in ignored:
    signal.signal(number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent is not None

  def follow() -> None:
    parent.join()
    os._exit(1)

  # One that was killed closes nothing.
  threading.Thread(target=follow, name="parent", daemon=True).start()
