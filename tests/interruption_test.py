import os
import signal
import threading

import pytest

from resnet_flax import interruption

pytestmark = pytest.mark.usefixtures("ctrl_c")


def press_ctrl_c():
  os.kill(os.getpid(), signal.SIGINT)


def test_the_first_waits_for_check():
  before = signal.getsignal(signal.SIGINT)
  with interruption.InterruptWatch() as watch:
    watch.check()
    press_ctrl_c()
    with pytest.raises(KeyboardInterrupt):
      watch.check()
  assert signal.getsignal(signal.SIGINT) is before


def test_the_second_does_not_wait():
  with interruption.InterruptWatch():
    press_ctrl_c()
    with pytest.raises(KeyboardInterrupt):
      press_ctrl_c()


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it():
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  with interruption.InterruptWatch() as watch:
    press_ctrl_c()
    press_ctrl_c()
    watch.check()


def test_other_threads_have_no_signals():
  done = []

  def work():
    with interruption.InterruptWatch() as watch:
      watch.check()
    done.append(True)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert done
