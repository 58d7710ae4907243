"""Ctrl-C at moments of our choosing, so that nothing is left half done."""

import signal
import threading
from types import FrameType


class InterruptWatch:
  """While entered, Ctrl-C is only noted; `check` acts on it.

  Libraries that run an event loop (Orbax saves in one) would otherwise meet
  the exception in the middle of their work. A second Ctrl-C is not held back.
  It does nothing outside the main thread, where Python delivers no signals,
  and in a process that ignores Ctrl-C, such as a shell's background job.
  """

  def __init__(self) -> None:
    self._requested = False
    self._previous = signal.getsignal(signal.SIGINT)
    self._active = (
      threading.current_thread() is threading.main_thread()
      and self._previous is not signal.SIG_IGN
    )

  def __enter__(self) -> "InterruptWatch":
    if self._active:
      signal.signal(signal.SIGINT, self._note)
    return self

  def __exit__(self, *exception: object) -> None:
    if self._active:
      signal.signal(signal.SIGINT, self._previous)

  def _note(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    if self._requested:
      raise KeyboardInterrupt
    self._requested = True

  def check(self) -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed."""
    if self._requested:
      raise KeyboardInterrupt
