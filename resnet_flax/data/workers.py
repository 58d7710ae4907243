"""Worker processes that decode images; Grain starts them."""

import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

from resnet_flax.run import errors


class Workers:
  """Watches the processes that Grain starts for an iterator.

  Grain waits forever for a worker that is killed while it sends images, since
  this process, too, keeps the sending end of the pipe open.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    self._folder, self._others = folder, set(multiprocessing.active_children())
    self._own: set[multiprocessing.process.BaseProcess] = set()

  def next_of(self, iterator: Iterator[Any]) -> Any:
    """Returns the next item; raises `DataError` if a worker was killed."""
    result: futures.Future[Any] = futures.Future()

    def take() -> None:
      try:
        result.set_result(next(iterator))
      except Exception as error:
        result.set_exception(error)

    threading.Thread(target=take, name="next images", daemon=True).start()
    while futures.wait([result], 0.2).not_done and not self._died():
      pass
    # `_died` notes new workers: it must run at every item, before they end.
    died = self._died()
    error = result.exception() if result.done() else None
    # Grain itself reports some dead workers.
    if error and "terminated unexpectedly" in str(error):
      died = died or errors.one_line(error)
    if result.done() and not (error and died):
      return result.result()
    raise errors.DataError(
      f"a process that decodes images of {self._folder} has ended ({died}). A"
      " code below 0 means that it was killed, most likely as memory ran out:"
      " pass a smaller --config.dataset.num_workers. Otherwise see its message"
      " above; a script must train inside: if __name__ == '__main__'."
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
    """Closes the iterator and ends all workers."""
    if not self._died():
      iterator.close()
    else:  # Closing would wait for the dead workers.
      for worker in self._own:
        worker.kill()


def check_semaphores() -> None:
  """Raises `DataError` if semaphores, which workers share, cannot be made."""
  try:
    multiprocessing.Semaphore()
  except OSError as error:
    raise errors.DataError(
      "processes that decode images cannot be started: no semaphore can be made"
      f" in /dev/shm ({error.strerror}). Make /dev/shm writable and free some"
      " space there, or set dataset.num_workers=0."
    ) from error


def import_grain() -> Any:
  """Imports Grain on first use, since that takes a second or two."""
  from absl import flags

  with errors.extra("streaming", "decoding while training"):
    import grain
  # Grain reads its own absl flags. If no flags were parsed, as in a notebook,
  # absl raises an error, except for flags that are `present`.
  for name in flags.FLAGS:
    if name.startswith("grain_"):
      flags.FLAGS[name].present = 1
  return grain


def start(ignored: Sequence[signal.Signals], index: int, count: int) -> None:
  """Makes a worker ignore signals and end with its parent process."""
  # Ctrl-C and schedulers signal all processes of a job. The parent decides
  # when to stop, and still needs batches for its last step.
  for number in ignored:
    signal.signal(number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent is not None

  def follow() -> None:
    parent.join()
    os._exit(1)

  # A killed parent cannot close its workers.
  threading.Thread(target=follow, name="parent", daemon=True).start()
