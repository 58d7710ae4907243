"""How command lines start and end."""

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
from resnet_flax.run import process

class Swallows(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    if name == "jax":
      try:
        signal.raise_signal({number})
      except BaseException:
        pass

sys.meta_path.insert(0, Swallows())
process.run(lambda argv: __import__("jax"))
"""
ENDING = """
import atexit, signal
from resnet_flax.run import process

def main(argv):
  atexit.register(signal.raise_signal, {number})

process.run(main)
"""
CLEANING = """
import signal
from resnet_flax.run import process, signals

def main(argv):
  with signals.StopSignals():
    try:
      signal.raise_signal({number})
    finally:
      print("cleaned up", flush=True)

process.run(main)
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
  ("program", "printed", "number"),
  [
    (STARTING, "", signal.SIGTERM),
    (CLEANING, "cleaned up\n", signal.SIGINT),
    pytest.param(STARTING, "", signal.SIGINT, marks=pytest.mark.slow),
    pytest.param(
      CLEANING, "cleaned up\n", signal.SIGTERM, marks=pytest.mark.slow
    ),
  ],
)
def test_a_signal_ends_in_one_line(program, printed, number):
  """Also while a library is imported that catches whatever is raised."""
  ended = run(program, number)
  assert ended.returncode == 128 + number
  line = f"error: stopped by {number.name}; nothing new was saved.\n"
  assert ended.stderr == line
  assert ended.stdout == printed


def test_a_signal_after_the_work_is_done():
  ended = run(ENDING, signal.SIGTERM)
  assert (ended.returncode, ended.stderr) == (0, "")
