import os
import pathlib
import subprocess
from importlib import metadata

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


def changes(old, new):
  return {
    key: (old.get(key), new.get(key))
    for key in old.keys() | new.keys()
    if old.get(key) != new.get(key)
  }


def state():
  described = environment.describe(jax.devices()[:2])
  assert described["devices"] == ["cpu", "cpu"]
  return described["git_commit"], described["git_clean"]


def test_clean_and_dirty_checkout(checkout):
  commit, clean = state()
  assert len(commit) == 40
  assert clean is True
  # What is not executed: a report, a run, notes.
  (checkout / "report").mkdir()
  (checkout / "report" / "index.html").write_text("")
  assert state() == (commit, True)


@pytest.mark.parametrize(
  "path", ["resnet_flax/new.py", "configs/new.py", "pyproject.toml"]
)
def test_what_a_run_executes_is_not_clean(checkout, path):
  (checkout / path).parent.mkdir(exist_ok=True)
  (checkout / path).write_text("")
  _, clean = state()
  assert clean is False
  git(checkout, "add", path)
  git(checkout, "commit", "-m", "second")
  assert state()[1] is True
  (checkout / path).write_text("# Changed.")
  assert state()[1] is False


def test_installed_inside_another_checkout(checkout):
  git(checkout, "rm", "--cached", "environment.py")
  git(checkout, "commit", "-m", "second")
  assert state() == (None, None)


def test_without_git(checkout, monkeypatch):
  monkeypatch.setitem(os.environ, "PATH", "")
  assert state() == (None, None)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("jax_enable_x64", True),
    ("jax_default_prng_impl", "rbg"),
    ("jax_threefry_partitionable", False),
    ("jax_default_matmul_precision", "bfloat16"),
    ("jax_random_seed_offset", 1),
  ],
)
def test_settings_of_jax_are_recorded(name, value):
  before = environment.describe(jax.devices())
  kept = getattr(jax.config, name)
  jax.config.update(name, value)
  try:
    after = environment.describe(jax.devices())
  finally:
    jax.config.update(name, kept)
  assert changes(before, after) == {name: (kept, value)}


@pytest.mark.parametrize(
  "name", ["XLA_FLAGS", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS"]
)
def test_variables_are_recorded(monkeypatch, name):
  monkeypatch.delenv(name, raising=False)
  before = environment.describe(jax.devices())
  monkeypatch.setenv(name, "1")
  after = environment.describe(jax.devices())
  assert changes(before, after) == {name: (None, "1")}


def test_versions_of_what_makes_pixels(monkeypatch):
  libraries = environment.describe(jax.devices())["libraries"]
  for name in ("pillow", "grain", "array-record", "scikit-learn"):
    assert libraries[name] == metadata.version(name)
  version = metadata.version

  def without_extras(name):
    if name == "scikit-learn":
      raise metadata.PackageNotFoundError(name)
    return version(name)

  monkeypatch.setattr(metadata, "version", without_extras)
  libraries = environment.describe(jax.devices())["libraries"]
  assert libraries["scikit-learn"] is None


CPU = """processor : 0
model name\t: AMD EPYC
cpu family\t: 25
model\t: {}
stepping\t: 1
flags\t: fpu sse4_2 avx2 {} rdtscp

processor : 1
model name\t: AMD EPYC
"""


@pytest.mark.parametrize(
  ("text", "generation", "flags"),
  [
    (
      CPU.format(17, "avx512_bf16"),
      "cpu family 25, model 17, stepping 1",
      "avx2 avx512_bf16 sse4_2",
    ),
    (CPU.format(1, ""), "cpu family 25, model 1, stepping 1", "avx2 sse4_2"),
    ("processor: 0\nFeatures: fp asimd bf16\n", "", "asimd bf16"),
    ("", "", ""),
  ],
)
def test_a_processor_is_more_than_its_name(
  monkeypatch, text, generation, flags
):
  monkeypatch.setattr(pathlib.Path, "read_text", lambda path: text)
  found = environment.cpu()
  assert found["cpu_model"]
  assert (found["cpu_generation"], found["cpu_flags"]) == (generation, flags)
