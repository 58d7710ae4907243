import os
import pathlib
import platform
import subprocess
import sys

import pytest

from resnet_flax.run import huge_pages

ROOT = pathlib.Path(__file__).parents[2]
GLIBC = "glibc", "2.36"
MADVISE = "always [madvise] never\n"
SETTING = "glibc.malloc.hugetlb=1"


def test_asks_glibc_for_huge_pages():
  environ = huge_pages.environment({"A": "b"}, GLIBC, MADVISE)
  assert environ == {"A": "b", "GLIBC_TUNABLES": SETTING}


def test_keeps_the_users_other_settings():
  environ = {"GLIBC_TUNABLES": "x=1"}
  assert huge_pages.environment(environ, GLIBC, MADVISE) == {
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
  assert huge_pages.environment(environ, libc, mode) is None


def test_starts_again_with_the_same_command_line_once():
  environ = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  program = (
    "import os, sys; from resnet_flax.run import huge_pages;"
    " print('start', flush=True); huge_pages.use();"
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
  changed = huge_pages.environment(environ, libc, mode)
  starts = 1 if changed is None else 2
  setting = (changed or environ).get("GLIBC_TUNABLES")
  expected = "start\n" * starts + f"['--a=1', 'b c'] {setting}\n"
  assert result.stdout == expected
