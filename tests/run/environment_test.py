import os
import subprocess

import jax
import pytest

from resnet_flax.run import environment


def git(folder, *arguments):
  identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
  identity += ["-c", "commit.gpgsign=false"]
  subprocess.run(
    ["git", "-C", str(folder), *identity, *arguments],
    check=True,
    capture_output=True,
  )


@pytest.fixture
def checkout(tmp_path, monkeypatch):
  """A git checkout that holds a copy of the module."""
  module = tmp_path / "environment.py"
  module.write_text("")
  git(tmp_path, "init")
  git(tmp_path, "add", ".")
  git(tmp_path, "commit", "-m", "first")
  monkeypatch.setattr(environment, "__file__", str(module))
  return tmp_path


def state():
  described = environment.describe(jax.devices()[:2])
  assert described["devices"] == ["cpu", "cpu"]
  return described["git_commit"], described["git_clean"]


def test_clean_and_dirty_checkout(checkout):
  commit, clean = state()
  assert len(commit) == 40
  assert clean is True
  (checkout / "new").write_text("")
  assert state() == (commit, False)


def test_installed_inside_another_checkout(checkout):
  git(checkout, "rm", "--cached", "environment.py")
  git(checkout, "commit", "-m", "second")
  assert state() == (None, None)


def test_without_git(checkout, monkeypatch):
  monkeypatch.setitem(os.environ, "PATH", "")
  assert state() == (None, None)


def test_changes():
  old = {"a": 1, "b": {"c": 1}, "d": 1}
  new = {"a": 1, "b": {"c": 2}, "e": 1}
  assert environment.changes(old, new) == [
    "b: {'c': 1} -> {'c': 2}",
    "d: 1 -> None",
    "e: None -> 1",
  ]
  assert environment.changes(old, old) == []
