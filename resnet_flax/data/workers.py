"""Worker processes that decode images; Grain starts them."""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

from resnet_flax.run import errors


def watched(pipeline: Iterable[Any], folder: pathlib.Path) -> Iterator[Any]:
  """Yields what Grain's processes make; they end with this iterator.

  Grain waits forever for a worker that is killed while it sends images, since
  this process, too, keeps the sending end of the pipe open. This iterator
  raises a `DataError`, which names `folder`.
  """
  check_semaphores()
  # Python's resource tracker would warn as it cleans up after an error.
  os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
  others = set(multiprocessing.active_children())
  own: set[multiprocessing.process.BaseProcess] = set()
  iterator: Any = iter(pipeline)

  def take(result: futures.Future[Any]) -> None:
    try:
      result.set_result(next(iterator))
    except Exception as error:
      result.set_exception(error)

  def died() -> str:
    for child in {*multiprocessing.active_children()} - others:
      if child.name.startswith("grain-process-prefetch"):
        own.add(child)
    codes = [worker.exitcode for worker in own if worker.exitcode]
    return f"exit code {codes[0]}" if codes else ""

  try:
    while True:
      result: futures.Future[Any] = futures.Future()
      threading.Thread(target=take, args=[result], daemon=True).start()
      while futures.wait([result], 0.2).not_done and not died():
        pass
      # `died` notes new workers: it must run at every item, before they end.
      reason = died()
      error = result.exception() if result.done() else None
      # Grain reports some dead workers; Python, one that cannot start.
      ends = "terminated unexpectedly", "bootstrapping phase"
      if error and any(end in str(error) for end in ends):
        reason = reason or errors.one_line(error)
      if not result.done() or (error and reason):
        raise errors.DataError(
          f"a process that decodes images of {folder} has ended ({reason}). A"
          " code below 0 means that it was killed, most likely as memory ran"
          " out: pass a smaller --config.dataset.num_workers. Otherwise see its"
          " message above; a script must train inside: if __name__ =="
          " '__main__', or set dataset.num_workers=0."
        ) from error
      yield result.result()
  finally:
    if died():  # Closing would wait for the dead workers.
      for worker in own:
        worker.kill()
    else:
      with contextlib.suppress(AssertionError):  # One has never started.
        iterator.close()


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
