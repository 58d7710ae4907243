"""Signals to stop at chosen moments, so that nothing is left half done."""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from resnet_flax.run import errors

# Ctrl-C, a scheduler, a terminal that closes, and Slurm's --signal=USR1@60.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Seconds in which the interpreter must notice a signal by itself; it cannot
# while XLA compiles.
_GRACE = 3.0


class Stopped(KeyboardInterrupt):
  """A signal asked the program to stop; `number` says which."""

  def __init__(self, number: int):
    super().__init__(signal.Signals(number).name)
    self.number = number


class StopSignals:
  """While entered, `SIGNALS` raise `Stopped`, or are held back.

  Inside `hold()` the first signal waits for `check`, which the loop calls:
  libraries that run an event loop, as Orbax does when it saves, would otherwise
  meet the exception in the middle of their work. A second one never waits.

  Does nothing outside the main thread, where Python delivers no signals, and to
  a signal that the process ignores, as a shell's background job does Ctrl-C and
  nohup's command SIGHUP.

  Args:
    exits: a second signal, or a first one that finds nothing to save and an
      interpreter that is busy in compiled code, ends the process. For command
      lines; a notebook must survive.
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
    if self._exits and self._previous:
      ears, self._wakeup = socket.socketpair()
      self._wakeup.setblocking(False)
      signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
      threading.Thread(target=self._listen, args=[ears], daemon=True).start()
    return self

  def __exit__(self, *exception: object) -> None:
    for number, previous in self._previous.items():
      signal.signal(number, previous)  # type: ignore[arg-type]
    if self._exits and self._previous:
      signal.set_wakeup_fd(-1)
      # The listening thread ends with its socket.
      self._wakeup.close()
    self._previous = {}

  @contextlib.contextmanager
  def hold(self) -> Iterator[None]:
    """Inside, and after all was done, the first signal waits for `check`."""
    self._held = True
    try:
      yield
    except BaseException:
      self._held = False
      raise

  @property
  def requested(self) -> bool:
    """Whether a signal has come."""
    return self.number is not None

  def check(self) -> None:
    """Raises `Stopped` if a signal has come."""
    if self.number is not None:
      raise Stopped(self.number)

  def say_on_exit(self, message: Callable[[], str]) -> None:
    """Sets what is printed if the process must be ended from outside."""
    self._message = message

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    again = self.number is not None
    self.number = self.number or number
    if again or not self._held:
      raise Stopped(self.number)

  def _listen(self, ears: socket.socket) -> None:
    """Hears of signals whatever the main thread does."""
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
          errors.leave(self._message(), 128 + first[0])
        first = byte
        ears.settimeout(None if self._held else _GRACE)


class Timer:
  """Says when the next checkpoint is due, besides the end of an epoch.

  After every step that `every_steps` divides, and `every_minutes` after the
  last one; 0 turns either off. `clock` gives seconds.
  """

  def __init__(
    self,
    every_steps: int,
    every_minutes: float,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._every_steps = every_steps
    self._seconds = every_minutes * 60
    self._clock = clock
    self.reset()

  def due_at(self, step: int) -> bool:
    """Whether `every_steps` says so after `step` steps."""
    return bool(self._every_steps) and step % self._every_steps == 0

  def overdue(self) -> bool:
    """Whether `every_minutes` says so."""
    return bool(self._seconds) and self._clock() - self._last >= self._seconds

  def reset(self) -> None:
    """Takes note that a checkpoint was saved."""
    self._last = self._clock()
