"""How command lines end."""

import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("ctrl_c")

STARTING = """
import importlib.abc, signal, sys
from absl import app
from resnet_flax import program

class Swallows(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    if name == "jax":
      try:
        signal.raise_signal({number})
      except BaseException:
        pass

sys.meta_path.insert(0, Swallows())
program.run(lambda argv: print("done"))
"""
ENDING = """
import atexit, signal
from resnet_flax import program

def main(argv):
  atexit.register(signal.raise_signal, {number})

program.run(main)
"""
CLEANING = """
import signal
from resnet_flax import interruption, program

def main(argv):
  with interruption.StopSignals():
    try:
      signal.raise_signal({number})
    finally:
      print("cleaned up", flush=True)

program.run(main)
"""


def run(code, number):
  return subprocess.run(
    [sys.executable, "-c", code.format(number=int(number))],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
@pytest.mark.parametrize(
  ("program", "printed"), [(STARTING, ""), (CLEANING, "cleaned up\n")]
)
def test_a_signal_ends_in_one_line(program, printed, number, code):
  """Also while a library is imported that catches whatever is raised."""
  ended = run(program, number)
  assert ended.returncode == code
  line = f"error: stopped by {number.name}; nothing new was saved.\n"
  assert ended.stderr == line
  assert ended.stdout == printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_work_is_done(number):
  ended = run(ENDING, number)
  assert (ended.returncode, ended.stderr) == (0, "")
