"""How command lines start and end."""

import os
import pathlib
import platform
import signal
import subprocess
import sys

import pytest

from resnet_flax.run import process

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


GLIBC = "glibc", "2.36"
MADVISE = "always [madvise] never\n"
SETTING = "glibc.malloc.hugetlb=1"


def test_asks_glibc_for_huge_pages():
  environ = process.environment_with_huge_pages({"A": "b"}, GLIBC, MADVISE)
  assert environ == {"A": "b", "GLIBC_TUNABLES": SETTING}


def test_keeps_the_users_other_settings():
  environ = {"GLIBC_TUNABLES": "x=1"}
  assert process.environment_with_huge_pages(environ, GLIBC, MADVISE) == {
    "GLIBC_TUNABLES": f"x=1:{SETTING}"
  }


@pytest.mark.parametrize(
  ("environ", "libc", "mode"),
  [
    ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, GLIBC, MADVISE),
    ({}, GLIBC, "[always] madvise never"),
    ({}, GLIBC, "always madvise [never]"),
    ({}, ("glibc", "2.31"), MADVISE),
    ({}, ("glibc", "2.4"), MADVISE),
    ({}, ("", ""), MADVISE),
  ],
)
def test_does_nothing_where_user_or_system_decide(environ, libc, mode):
  assert process.environment_with_huge_pages(environ, libc, mode) is None


def test_starts_again_with_the_same_command_line_once():
  environ = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  program = (
    "import os, sys; from resnet_flax.run import process;"
    " print('start', flush=True); process.use_huge_pages();"
    " print(sys.argv[1:], os.environ.get('GLIBC_TUNABLES'))"
  )
  result = subprocess.run(
    [sys.executable, "-c", program, "--a=1", "b c"],
    cwd=ROOT,
    env=environ,
    capture_output=True,
    text=True,
    check=True,
  )
  path = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
  mode = path.read_text() if path.exists() else ""
  libc = platform.libc_ver()
  changed = process.environment_with_huge_pages(environ, libc, mode)
  starts = 1 if changed is None else 2
  setting = (changed or environ).get("GLIBC_TUNABLES")
  expected = "start\n" * starts + f"['--a=1', 'b c'] {setting}\n"
  assert result.stdout == expected
