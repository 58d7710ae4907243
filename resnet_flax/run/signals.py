"""Stops at chosen moments after a signal, so that nothing is left half done."""

import contextlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from resnet_flax.run import errors

# Ctrl-C, a scheduler, a terminal that closes, and Slurm's --signal=USR1@60.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Seconds in which a second signal does not count: GNU's timeout sends one to a
# process and then to its group, systemd sends SIGTERM and then SIGHUP.
_ECHO = 0.05
# Seconds that the interpreter may take to notice a signal by itself. It notices
# none while XLA compiles.
_GRACE = 3.0


class Stopped(KeyboardInterrupt):
  """A signal asked the program to stop; `number` says which."""

  def __init__(self, number: int):
    super().__init__(signal.Signals(number).name)
    self.number = number


class StopSignals:
  """While entered, `SIGNALS` raise `Stopped`, or wait for `check`.

  An exception must not hit libraries with an event loop, such as Orbax, in the
  middle of their work. So inside `hold()` the first signal waits for `check`,
  which the loop calls. A second signal, after 0.05 s, never waits.

  Does nothing outside the main thread, where Python delivers no signals.
  Ignored signals stay ignored: Ctrl-C in a background job, SIGHUP under nohup.

  Args:
    exits: a second signal ends the process. A first one does, too, if it need
      not wait and compiled code keeps the interpreter busy. For command lines;
      a notebook must survive.
  """

  def __init__(self, *, exits: bool = False):
    self.number: int | None = None  # The first signal that has come.
    self._exits = exits
    self._held = False
    self._previous: dict[int, object] = {}
    self._message: Callable[[], str] = lambda: "stopped."

  def __enter__(self) -> "StopSignals":
    if threading.current_thread() is not threading.main_thread():
      return self
    for number in SIGNALS:
      previous = signal.getsignal(number)
      if previous is not signal.SIG_IGN:
        self._previous[number] = previous
        signal.signal(number, self._note)
    if self._previous:
      self._unraisable = sys.unraisablehook
      # Python drops exceptions in destructors and in callbacks of its garbage
      # collector, such as XLA's. `check` or `_listen` stops the program later.
      sys.unraisablehook = errors.quiet(
        self._unraisable, lambda error: isinstance(error, Stopped)
      )
    if self._exits and self._previous:
      reader, self._wakeup = socket.socketpair()
      self._wakeup.setblocking(False)
      signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
      threading.Thread(target=self._listen, args=[reader], daemon=True).start()
    return self

  def __exit__(self, *exception: object) -> None:
    for number, previous in self._previous.items():
      signal.signal(number, previous)  # type: ignore[arg-type]
    if self._previous:
      sys.unraisablehook = self._unraisable
    if self._exits and self._previous:
      signal.set_wakeup_fd(-1)
      # The listening thread ends with its socket.
      self._wakeup.close()
    self._previous = {}

  @contextlib.contextmanager
  def hold(self) -> Iterator[None]:
    """Makes the first signal wait for `check`, also after leaving normally."""
    self._held = True
    try:
      yield
    except BaseException:
      self._held = False
      raise

  def check(self) -> None:
    """Raises `Stopped` if a signal has come."""
    if self.number is not None:
      raise Stopped(self.number)

  def say_on_exit(self, message: Callable[[], str]) -> None:
    """Sets the message for a process that a signal ends at once."""
    self._message = message

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self.number is None:
      self.number, self._came = number, time.monotonic()
      if self._held:
        return
    elif time.monotonic() - self._came < _ECHO:
      return
    raise Stopped(self.number)

  def _listen(self, reader: socket.socket) -> None:
    """Receives signals even while the main thread cannot handle them."""
    first = b""
    with reader:
      while True:
        try:
          byte = reader.recv(1)
        except TimeoutError:  # The main thread has not ended in time.
          errors.exit_with(self._message(), 128 + first[0])
        if not byte:
          return
        if byte[0] not in self._previous:
          continue
        if not first:
          first, came = byte, time.monotonic()
          reader.settimeout(None if self._held else _GRACE)
        elif time.monotonic() - came > _ECHO:
          errors.exit_with(self._message(), 128 + first[0])
