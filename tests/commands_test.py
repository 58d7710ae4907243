"""Every command of the README and the manual is run by a test, or marked."""

import ast
import pathlib
import re
import shlex
import tomllib

import pytest

from resnet_flax.run import experiment
from tests.helpers import ROOT, parse_command_line

# How ml_collections loads config files.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HERE = "commands_test.py::"
# What runs a command that a pattern fits; the first one counts.
RUN_BY = {
  r"python3 -m venv ": ".ci/run",
  r"pip install ": HERE + "test_extras_exist",
  r"resnet-flax ": (
    "package_test.py::test_the_installed_wheel_works_in_any_folder"
  ),
  r".*=DIR\b": "data/folders_test.py::test_the_commands_of_the_page_train",
  r".*\.main .*--config\.init_from=": (
    "tools/convert_test.py::test_scored_and_trained_on"
  ),
  r".*\.main .*--coordinator_address=": (
    "parallel/hosts_test.py::test_two_processes_are_one_run"
  ),
  r".*\.main .*--config=": HERE + "test_the_command_says_what_it_trains",
  r".*\.main .*--weights=": (
    "parallel/averaging_test.py::test_both_weights_are_loaded_and_scored"
  ),
  r".*\.main --mode=eval ": "main_test.py::test_train_again_and_eval",
  r".*\.predict ": "tools/predict_test.py::test_the_commands_of_the_page",
  r".*\.convert ": "tools/convert_test.py::test_command_line",
  r".*\.export ": "tools/export/command_test.py::test_the_commands_of_the_page",
  r".*\.compare ": "tools/compare_test.py::test_commands_of_the_page",
  r".*\.report ": "tools/report/main_test.py::test_report",
  r".*experiments\.sweep .*--dry_run": (
    "experiments/tools/sweep_test.py::test_depth_ablations_can_be_used"
  ),
  r".*experiments\.tpu_compile ": (
    "experiments/tools/tpu_compile_test.py::test_compiles_for_a_tpu"
  ),
}
MARK = re.compile(r"\bnot run\b|nothing on this page has been run", re.I)


def commands():
  """Each command with the text of its section that stands before it."""
  for page in PAGES:
    text = page.read_text()
    for block in re.finditer(r"^```sh\n(.*?)^```", text, re.M | re.S):
      before = text[: block.start()]
      # What stands at the head of a page is said of all of it.
      said = before.partition("\n## ")[0] + before.rpartition("\n## ")[2]
      for line in block[1].splitlines():
        if not line.startswith("#"):
          yield line, said


ALL = list(commands())
TRAINING = [
  line
  for line, _ in ALL
  if re.match(r"python -m resnet_flax\.main --config=", line)
  and not re.search(r"=DIR\b|init_from|coordinator|\$HOME", line)
]


def runner(line):
  return next((by for each, by in RUN_BY.items() if re.match(each, line)), None)


def test_a_command_is_run_by_a_test_or_marked():
  assert len(ALL) > 50
  assert not [
    line for line, said in ALL if not runner(line) and not MARK.search(said)
  ]


@pytest.mark.parametrize("pattern", RUN_BY)
def test_what_runs_a_command_exists(pattern):
  assert any(runner(line) == RUN_BY[pattern] for line, _ in ALL)
  name, _, function = RUN_BY[pattern].partition("::")
  if not function:
    assert (ROOT / name).exists()
    return
  defined = ast.walk(ast.parse((ROOT / "tests" / name).read_text()))
  assert function in [
    each.name for each in defined if isinstance(each, ast.FunctionDef)
  ]


def test_extras_exist():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  lines = [line for line, _ in ALL if "pip install" in line]
  extras = {
    extra
    for line in lines
    for names in re.findall(r"\.\[([\w,-]+)\]", line)
    for extra in names.split(",")
  }
  assert len(extras) > 5
  assert extras <= set(project["optional-dependencies"])


@pytest.mark.parametrize("line", TRAINING)
def test_the_command_says_what_it_trains(line, monkeypatch):
  """Its flags are parsed, its keys checked, its network built."""
  monkeypatch.chdir(ROOT)
  config, workdir = parse_command_line(*shlex.split(line)[2:])
  assert experiment.build(config).model.stage_sizes
  (name,) = re.findall(r"--config=configs/(\w+)", line)
  assert pathlib.PurePath(workdir).name.startswith(name)
