import sys
import threading

import pytest

from resnet_flax import command_line


@pytest.fixture
def hook(monkeypatch):
  """What `set_up` sets, without the rest of what it does."""
  monkeypatch.setattr(sys, "excepthook", command_line._of_main_thread)


def report():
  error = ValueError("of a library")
  sys.excepthook(ValueError, error, None)


@pytest.mark.usefixtures("hook")
def test_tracebacks_of_native_threads_are_not_shown(capsys):
  thread = threading.Thread(target=report)
  thread.start()
  thread.join()
  assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("hook")
def test_tracebacks_of_the_program_are_shown(capsys):
  report()
  assert "ValueError: of a library" in capsys.readouterr().err
