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
    self._restore = contextlib.ExitStack()
    # Makes the message of a process that a signal ends at once.
    self.exit_message: Callable[[], str] = lambda: "stopped."

  def __enter__(self) -> "StopSignals":
    if threading.current_thread() is not threading.main_thread():
      return self
    for number in SIGNALS:
      previous = signal.getsignal(number)
      if previous is not signal.SIG_IGN:
        signal.signal(number, self._note)
        self._restore.callback(signal.signal, number, previous)
    # Python drops exceptions in destructors and in callbacks of its garbage
    # collector, such as XLA's. `check` or `_listen` stops the program later.
    hook = sys.unraisablehook
    sys.unraisablehook = errors.quiet(hook, lambda e: isinstance(e, Stopped))
    self._restore.callback(setattr, sys, "unraisablehook", hook)
    if self._exits:
      reader, wakeup = socket.socketpair()
      wakeup.setblocking(False)
      # The listening thread ends with its socket.
      self._restore.callback(wakeup.close)
      signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
      self._restore.callback(signal.set_wakeup_fd, -1)
      threading.Thread(target=self._listen, args=[reader], daemon=True).start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._restore.close()

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
          errors.exit_with(self.exit_message(), 128 + first[0])
        if not byte:
          return
        if byte[0] not in SIGNALS:  # Another library's, such as SIGCHLD.
          continue
        if not first:
          first, came = byte, time.monotonic()
          reader.settimeout(None if self._held else _GRACE)
        elif time.monotonic() - came > _ECHO:
          errors.exit_with(self.exit_message(), 128 + first[0])
