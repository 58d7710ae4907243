"""Ctrl-C at moments of our choosing, so that nothing is left half done."""

import signal
import threading
from types import FrameType


class InterruptWatch:
  """While entered, Ctrl-C is only noted; `check` acts on it.

  Libraries that run an event loop (Orbax saves in one) would otherwise meet
  the exception in the middle of their work. A second Ctrl-C is not held back.
  Outside the main thread, where Python delivers no signals, it does nothing.
  """

  def __init__(self) -> None:
    self._requested = False

  def __enter__(self) -> "InterruptWatch":
    if threading.current_thread() is threading.main_thread():
      self._previous = signal.signal(signal.SIGINT, self._note)
    return self

  def __exit__(self, *exception: object) -> None:
    if threading.current_thread() is threading.main_thread():
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
