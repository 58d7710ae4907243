import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from resnet_flax.run import signals as signals_lib

pytestmark = pytest.mark.usefixtures("ctrl_c")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def send(number):
  os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_without_hold_it_is_raised_at_once(number):
  before = [signal.getsignal(each) for each in SIGNALS]
  with signals_lib.StopSignals() as signals:
    with pytest.raises(signals_lib.Stopped) as caught:
      send(number)
    assert caught.value.number == number
    assert str(caught.value) == signal.Signals(number).name
    assert signals.number
  assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_waits_for_check(number):
  with signals_lib.StopSignals() as signals, signals.hold():
    signals.check()
    assert not signals.number
    send(number)
    assert signals.number
    with pytest.raises(signals_lib.Stopped) as caught:
      signals.check()
    assert caught.value.number == number


def test_what_comes_after_all_is_done_is_no_error():
  with signals_lib.StopSignals() as signals:
    with signals.hold():
      pass
    send(signal.SIGTERM)
    assert signals.number
  with signals_lib.StopSignals() as signals:
    with contextlib.suppress(ValueError), signals.hold():
      raise ValueError
    with pytest.raises(signals_lib.Stopped):
      send(signal.SIGTERM)


@pytest.mark.parametrize("place", ["garbage collector", "destructor"])
def test_where_python_drops_exceptions_it_stays_requested(place, capsys):
  class Ends:
    def __del__(self):
      signal.raise_signal(signal.SIGINT)

  def collected(phase, info):
    signal.raise_signal(signal.SIGINT)
    gc.callbacks.remove(collected)

  with signals_lib.StopSignals() as stops:
    if place == "destructor":
      Ends()
    else:
      gc.callbacks.append(collected)
      gc.collect()
    gc.callbacks[:] = [c for c in gc.callbacks if c is not collected]
    assert stops.number
    with pytest.raises(signals_lib.Stopped):
      stops.check()
  assert capsys.readouterr().err == ""


def test_the_second_does_not_wait():
  with signals_lib.StopSignals() as signals, signals.hold():
    send(signal.SIGTERM)
    signals._came -= 1  # A second ago.
    with pytest.raises(signals_lib.Stopped) as caught:
      send(signal.SIGINT)
    assert caught.value.number == signal.SIGTERM


@pytest.mark.parametrize("echo", [signal.SIGTERM, signal.SIGHUP])
def test_an_echo_is_no_second_signal(echo, monkeypatch):
  """Of GNU's timeout and of systemd, which ends a session of ssh so."""
  monkeypatch.setattr(signals_lib, "_ECHO", 0.9)
  with signals_lib.StopSignals() as signals, signals.hold():
    send(signal.SIGTERM)
    send(echo)
    assert signals.number == signal.SIGTERM
    signals._came -= 1  # A second later.
    with pytest.raises(signals_lib.Stopped):
      send(echo)


def test_an_echo_ends_no_busy_command():
  # Two that come at once may be one for the kernel.
  slow = BUSY.replace("with", "signals_lib._ECHO = 60\nwith", 1)
  with subprocess.Popen(
    [sys.executable, "-c", slow, "hold"], stdout=subprocess.PIPE, text=True
  ) as process:
    assert process.stdout.readline() == "busy\n"
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
      process.send_signal(number)
      time.sleep(0.2)
    assert process.poll() is None
    process.kill()


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it():
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with signals_lib.StopSignals() as signals:
    send(signal.SIGINT)
    send(signal.SIGINT)
    signals.check()
    with pytest.raises(signals_lib.Stopped):
      send(signal.SIGTERM)


def test_other_threads_have_no_signals():
  done = []

  def work():
    with signals_lib.StopSignals(exits=True) as signals:
      signals.check()
    done.append(True)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert done


def test_a_command_leaves_no_thread_behind():
  before = threading.active_count()
  with signals_lib.StopSignals(exits=True):
    assert threading.active_count() == before + 1
  deadline = time.monotonic() + 10
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert threading.active_count() == before


BUSY = """
import contextlib, ctypes, sys
from resnet_flax.run import signals as signals_lib
with signals_lib.StopSignals(exits=True) as signals:
  signals.exit_message = lambda: "where it stands"
  with signals.hold() if "hold" in sys.argv else contextlib.nullcontext():
    libc = ctypes.CDLL(None)
    mutex = (ctypes.c_char * 128)()
    libc.pthread_mutex_lock(mutex)
    print("busy", flush=True)
    # In C for ever, as it seems while XLA compiles: no Python handler can run.
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(
  ("arguments", "count", "number"),
  [
    ([], 1, signal.SIGTERM),
    ([], 2, signal.SIGINT),
    (["hold"], 2, signal.SIGTERM),
  ],
)
def test_a_busy_command_is_ended_from_outside(arguments, count, number):
  with subprocess.Popen(
    [sys.executable, "-c", BUSY, *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == "busy\n"
    time.sleep(0.2)
    for _ in range(count):
      process.send_signal(number)
      time.sleep(0.1)
    _, stderr = process.communicate(timeout=60)
  assert process.returncode == 128 + number
  assert stderr == "error: where it stands\n"
