"""What is installed: the wheel, its command, and what `import` costs."""

import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata

import pytest

import resnet_flax
from resnet_flax.tools import cli

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "use.md").read_text()
SECTION = PAGE.partition("## The installed program")[2].partition("\n## ")[0]


def test_importing_is_cheap():
  code = "import sys, resnet_flax; print(*sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  # NumPy and JAX take most of a second.
  assert not {"jax", "numpy", "flax", "absl"} & set(done.stdout.split())
  assert "resnet_flax" in done.stdout.split()


def test_the_version_is_that_of_the_installed_package():
  assert resnet_flax.__version__ == metadata.version("resnet_flax")
  assert "__version__" in dir(resnet_flax)


def command(monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["resnet-flax", *arguments])
  cli.run()


@pytest.mark.parametrize(
  ("name", "module", "rest"),
  [
    ("train", "main", ["--mode=train", "--workdir=a"]),
    ("eval", "main", ["--mode=eval", "--workdir=a"]),
    ("summary", "main", ["--mode=summary", "--workdir=a"]),
    *((name, name, ["--workdir=a"]) for name in cli.COMMANDS[3:-1]),
  ],
)
def test_commands_are_modules(name, module, rest, monkeypatch):
  started = []
  monkeypatch.setattr(
    cli.runpy,
    "run_module",
    lambda *names, **_: started.append((*names, *sys.argv[1:])),
  )
  command(monkeypatch, name, "--workdir=a")
  assert started == [(f"resnet_flax.{module}", *rest)]


def test_sweeps_are_run_in_the_repository(monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, "path", [*sys.path])
  started = []
  monkeypatch.setattr(
    cli.runpy, "run_module", lambda name, **_: started.append(name)
  )
  command(monkeypatch, "sweep", "--dry_run")
  assert (started, sys.argv[1:]) == (["experiments.sweep"], ["--dry_run"])


def test_every_door_is_a_command():
  doors = {
    path.stem
    for path in (ROOT / "resnet_flax").glob("*.py")
    if path.read_text().startswith('"""The command `python -m')
  }
  assert {"convert", "predict", "report"} <= doors <= set(cli.COMMANDS)


def test_help_lists_the_commands(monkeypatch, capsys):
  command(monkeypatch, "--help")
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("resnet-flax train|eval|summary|predict|convert|")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      ["predcit", "--topk=3"],
      "command='predcit' is not known. Did you mean 'p",
    ),
    ([], "command='' is not known. Known: compare, convert"),
    (["sweep"], "sweep must be run in the folder"),
  ],
)
def test_an_unknown_command_is_one_line(arguments, message, tmp_path):
  code = "from resnet_flax.tools import cli; cli.run()"
  done = subprocess.run(
    [sys.executable, "-c", code, *arguments],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stdout) == (2, "")
  (line,) = done.stderr.splitlines()
  assert line.startswith(f"error: {message}")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel of this checkout; building it needs setuptools from the index."""
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"
  for name in ("resnet_flax", "configs"):
    shutil.copytree(ROOT / name, source / name, symlinks=True)
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder]
  done = subprocess.run(
    [*build, "--retries=1", source], capture_output=True, text=True
  )
  if "No matching distribution found for setuptools" in done.stderr:
    pytest.skip("needs the package index, for setuptools")
  assert done.returncode == 0, done.stderr
  (path,) = folder.glob("*.whl")
  return path


@pytest.mark.slow
def test_the_wheel_has_the_package_and_nothing_else(wheel):
  assert wheel.stat().st_size < 1_000_000
  names = set(zipfile.ZipFile(wheel).namelist())
  expected = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "resnet_flax").rglob("*.py")
    if "configs" not in path.parts
  }
  expected |= {
    f"resnet_flax/configs/{path.name}"
    for path in (ROOT / "configs").iterdir()
    if path.suffix == ".py"
  }
  expected |= {"resnet_flax/py.typed"}
  expected |= {"resnet_flax/tools/report/page.html.jinja"}
  assert {name for name in names if ".dist-info/" not in name} == expected


@pytest.mark.slow
def test_the_installed_wheel_works_in_any_folder(wheel, tmp_path):
  venv, folder = tmp_path / "venv", tmp_path / "folder"
  subprocess.run([sys.executable, "-m", "venv", venv], check=True)
  environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

  def run(*command):
    done = subprocess.run(
      [venv / "bin" / command[0], *command[1:]],
      cwd=folder,
      env=environ,
      capture_output=True,
      text=True,
      timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  folder.mkdir()
  run("pip", "install", "--no-deps", "--no-index", wheel)
  # The libraries are those that run this test.
  (site,) = venv.glob("lib/python*/site-packages")
  (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
  found = run("python", "-c", "import resnet_flax as r; print(r.__file__)")
  assert found.startswith(str(site))
  assert not (site / "configs").exists()
  for command in (
    ("resnet-flax", "summary"),
    ("python", "-m", "resnet_flax.main", "--mode=summary"),
  ):
    shown = run(*command, "--config=v1_depth20")
    assert "Total parameters: 274,442" in shown
  commands = re.findall("^resnet-flax .*$", SECTION, re.MULTILINE)
  trained, scored, _ = [run(*shlex.split(command)) for command in commands]
  assert scored.splitlines()[1:] == trained.splitlines()[1:4]
  (code,) = re.findall("```python\n(.*?)```", SECTION, re.DOTALL)
  assert "'highway'" in run("python", "-c", code)
  for name in cli.COMMANDS:
    if importlib.util.find_spec(f"resnet_flax.{name}"):
      assert "--" in run("resnet-flax", name, "--help")
