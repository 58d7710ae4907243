"""How command lines start and end."""

import os
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
IMPORTING = """
import importlib.abc, runpy, signal, sys

class Stops(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    if name == "jax":
      signal.raise_signal({number})

sys.meta_path.insert(0, Stops())
name, *sys.argv[1:] = "COMMAND".split()
runpy.run_module("resnet_flax." + name, run_name="__main__", alter_sys=True)
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

TALKING = """
import logging, tqdm
from resnet_flax.run import errors, process, progress, surroundings

def main(argv):
  progress.log_to_stderr()
  tqdm.tqdm(disable=None).close()  # As of a run: none but on a terminal.
  logging.getLogger("resnet_flax").info("loss 1.0 ± 0.1")
  if argv[1:]:
    raise errors.UserError("a mistake")
  surroundings.show("accuracy 0.5 ± 0.1")

process.run(main)
"""
WITH_A_DEVICE = """
from resnet_flax.run import process
process.run(lambda argv: print(__import__("jax").devices()))
"""


def run_in_shell(code, redirection, **environment):
  """Standard output and error are redirected as a shell writes it."""
  return subprocess.run(
    ["sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, code],
    cwd=ROOT,
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    errors="replace",
    timeout=120,
  )


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
    (STARTING, "", signal.SIGUSR1),
    (CLEANING, "cleaned up\n", signal.SIGINT),
    (CLEANING, "cleaned up\n", signal.SIGHUP),
    pytest.param(STARTING, "", signal.SIGINT, marks=pytest.mark.slow),
    pytest.param(
      CLEANING, "cleaned up\n", signal.SIGTERM, marks=pytest.mark.slow
    ),
  ],
)
def test_a_signal_ends_in_one_line(program, printed, number):
  """Also during the import of a library that catches every exception."""
  ended = run(program, number)
  assert ended.returncode == 128 + number
  line = f"error: stopped by {number.name}; nothing new was saved.\n"
  assert ended.stderr == line
  assert ended.stdout == printed


@pytest.mark.parametrize(
  "command",
  [
    "main --mode=eval --workdir=none",
    "convert --source=none --config=configs/quickstart.py",
    "predict none README.md",
    "report none --out=none",
  ],
)
def test_ctrl_c_while_a_command_imports_jax(command):
  ended = run(IMPORTING.replace("COMMAND", command), signal.SIGINT)
  assert ended.returncode == 130
  assert ended.stderr == "error: stopped by SIGINT; nothing new was saved.\n"


def test_a_signal_after_the_work_is_done():
  ended = run(ENDING, signal.SIGTERM)
  assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "cp1251"])
def test_a_terminal_without_a_sign_shows_another(encoding):
  ended = run_in_shell(TALKING, "2>&1", PYTHONIOENCODING=f"{encoding}:strict")
  assert ended.returncode == 0, ended.stdout
  assert "accuracy 0.5 " in ended.stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line(unbuffered):
  ended = run_in_shell(TALKING, ">/dev/full", PYTHONUNBUFFERED=unbuffered)
  assert ended.returncode == 1
  assert "Traceback" not in ended.stderr
  message = "error: standard output cannot be written: No space left on device"
  assert ended.stderr.splitlines()[-1].startswith(message)


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", ">&-"])
def test_a_command_goes_on_without_messages(redirection):
  ended = run_in_shell(TALKING, redirection)
  assert ended.returncode == 0, ended.stderr
  assert ended.stdout == ("accuracy 0.5 ± 0.1\n" if "2" in redirection else "")
  assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_a_mistake_is_said_wherever_it_can_be(redirection):
  code = TALKING.replace("if argv[1:]", "if True")
  ended = run_in_shell(code, redirection)
  assert (ended.returncode, ended.stdout) == (1, "error: a mistake\n")


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_device_that_is_not_there_is_one_line(platform):
  ended = run_in_shell(WITH_A_DEVICE, "", JAX_PLATFORMS=platform)
  if ended.returncode == 0:
    pytest.skip(f"there is a {platform}")
  (line,) = ended.stderr.splitlines()
  assert line.startswith(f"error: JAX_PLATFORMS={platform}: ")
  assert ": )" not in line  # An error without a text.
  assert "'resnet_flax[cuda]'" in line
  assert ended.returncode == 1
