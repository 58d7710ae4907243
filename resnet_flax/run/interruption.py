"""Ctrl-C and SIGTERM at moments of our choosing: nothing is left half done."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds in which the interpreter is to notice a signal by itself; it cannot
# while XLA compiles.
_GRACE = 3.0


class Stopped(KeyboardInterrupt):
  """A signal asked the program to stop; `number` says which."""

  def __init__(self, number: int):
    super().__init__(signal.Signals(number).name)
    self.number = number


class StopSignals:
  """While entered, SIGINT and SIGTERM raise `Stopped`, or are held back.

  Inside `hold()` the first signal is only noted, for the loop to poll with
  `check`: libraries that run an event loop, as Orbax does when it saves, would
  otherwise meet the exception in the middle of their work. A second signal is
  never held back.

  With several processes, each has its own signals, and `distributed` has them
  agree on what to do.

  It does nothing outside the main thread, where Python delivers no signals,
  and it leaves alone a signal that the process ignores, as a shell's
  background job does with Ctrl-C.
  """

  def __init__(self, *, exits: bool = False):
    """Makes it; nothing is changed before it is entered.

    Args:
      exits: a second signal, or a first one that finds nothing to save and an
        interpreter that is busy in compiled code, ends the process. For
        command lines: a notebook is to live on.
    """
    self._exits = exits
    self._held = False
    self._number: int | None = None
    self._previous: dict[int, object] = {}
    self._message: Callable[[], str] = lambda: "stopped."

  def __enter__(self) -> "StopSignals":
    if threading.current_thread() is not threading.main_thread():
      return self
    for number in _SIGNALS:
      previous = signal.getsignal(number)
      if previous is not signal.SIG_IGN:
        self._previous[number] = previous
        signal.signal(number, self._note)
    if self._exits:
      self._watch()
    return self

  def __exit__(self, *exception: object) -> None:
    for number, previous in self._previous.items():
      signal.signal(number, previous)  # type: ignore[arg-type]
    if self._exits and self._previous:
      signal.set_wakeup_fd(-1)
      # The watching thread ends with its socket.
      self._wakeup.close()
    self._previous = {}

  @contextlib.contextmanager
  def hold(self) -> Iterator[None]:
    """Inside, the first signal waits for `check`.

    So it does afterwards, until this object is left: all was done.
    """
    self._held = True
    try:
      yield
    except BaseException:
      self._held = False
      raise

  @property
  def requested(self) -> bool:
    """Whether a signal has come."""
    return self._number is not None

  @property
  def number(self) -> int | None:
    """The first signal that has come, if any."""
    return self._number

  def check(self) -> None:
    """Raises `Stopped` if a signal has come."""
    if self._number is not None:
      raise Stopped(self._number)

  def say_on_exit(self, message: Callable[[], str]) -> None:
    """Sets what is printed if the process must be ended from outside."""
    self._message = message

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    again = self._number is not None
    if self._number is None:
      self._number = number
    if again or not self._held:
      raise Stopped(self._number)

  def _watch(self) -> None:
    """Starts a thread that hears of signals whatever the main one does."""
    ears, self._wakeup = socket.socketpair()
    self._wakeup.setblocking(False)
    signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
      first = b""
      with ears:
        while True:
          try:
            byte = ears.recv(1)
          except TimeoutError:
            byte = first  # The main thread is stuck.
          if not byte:
            return
          if byte[0] not in self._previous:
            continue
          if first:
            self._end(first[0])
          first = byte
          ears.settimeout(None if self._held else _GRACE)

    threading.Thread(target=listen, name="stop signals", daemon=True).start()

  def _end(self, number: int) -> NoReturn:
    print(f"error: {self._message()}", file=sys.stderr, flush=True)
    os._exit(128 + number)
