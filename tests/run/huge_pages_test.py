import os
import subprocess
import sys

import pytest

from resnet_flax.run import huge_pages


@pytest.fixture
def system(monkeypatch, tmp_path):
  """A Linux that leaves huge pages to programs, with glibc 2.36."""
  mode = tmp_path / "enabled"
  mode.write_text("always [madvise] never\n")
  monkeypatch.setattr(huge_pages, "_MODE", mode)
  monkeypatch.setattr(sys, "platform", "linux")
  monkeypatch.setattr(
    huge_pages.platform, "libc_ver", lambda: ("glibc", "2.36")
  )
  return mode


def test_asks_glibc_for_huge_pages(system):
  del system
  environ = huge_pages.environment_with_huge_pages({"A": "b"})
  assert environ == {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def test_keeps_the_users_other_settings(system):
  del system
  environ = huge_pages.environment_with_huge_pages({"GLIBC_TUNABLES": "x=1"})
  assert environ == {"GLIBC_TUNABLES": "x=1:glibc.malloc.hugetlb=1"}


def test_leaves_the_users_choice_alone(system):
  del system
  chosen = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
  assert huge_pages.environment_with_huge_pages(chosen) is None


@pytest.mark.parametrize("mode", ["[always] madvise never", "[never]"])
def test_does_nothing_where_the_system_decides(system, mode):
  system.write_text(mode)
  assert huge_pages.environment_with_huge_pages({}) is None


def test_does_nothing_without_transparent_huge_pages(system):
  system.unlink()
  assert huge_pages.environment_with_huge_pages({}) is None


@pytest.mark.parametrize("libc", [("", ""), ("glibc", "2.31")])
def test_does_nothing_with_another_libc(system, monkeypatch, libc):
  del system
  monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: libc)
  assert huge_pages.environment_with_huge_pages({}) is None


def test_starts_again_with_the_same_command_line_once():
  environ = {
    name: value
    for name, value in os.environ.items()
    if name != "GLIBC_TUNABLES"
  }
  program = (
    "import os, sys; from resnet_flax import huge_pages;"
    " print('start', flush=True); huge_pages.use_huge_pages();"
    " print(sys.argv[1:], os.environ.get('GLIBC_TUNABLES'))"
  )
  result = subprocess.run(
    [sys.executable, "-c", program, "--a=1", "b c"],
    env=environ,
    capture_output=True,
    text=True,
    check=True,
  )
  changed = huge_pages.environment_with_huge_pages(environ)
  starts = 1 if changed is None else 2
  setting = (changed or environ).get("GLIBC_TUNABLES")
  expected = "start\n" * starts + f"['--a=1', 'b c'] {setting}\n"
  assert result.stdout == expected
