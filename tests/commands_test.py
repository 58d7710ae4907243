"""Every command of the README and the manual is run, or marked."""

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

PAGES = [
  *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
  *sorted((ROOT / "docs").glob("*.md")),
]
HERE = "commands_test.py::"
# The test or the experiment that runs a command that a pattern fits; the first
# one counts.
RUN_BY = {
  r"python3 -m venv ": ".ci/run",
  r"\.ci/run$": ".ci/run",
  r"python -m pytest ": ".ci/run",
  r"pip install .*'\.\[": HERE + "test_extras_exist",
  r"pip install '\.\[|resnet-flax ": (
    "package_test.py::test_the_installed_wheel_works_in_any_folder"
  ),
  r".*=DIR\b": "data/folders_test.py::test_the_commands_of_the_page_train",
  r".*\.main --help": "main_test.py::test_help_needs_no_jax",
  r".*\.main .*--config\.init_from=": (
    "tools/convert_test.py::test_scored_and_trained_on"
  ),
  r".*\.main .*--coordinator_address=": (
    "parallel/hosts_test.py::test_two_processes_are_one_run"
  ),
  r".*\.main .*--mode=summary": "main_test.py::test_summary",
  r".*quickstart.py --config\.(ema|swa)\.|.*\.main .*--weights=": (
    "parallel/averaging_test.py::test_both_weights_are_loaded_and_scored"
  ),
  r".*quickstart.py|.*\.main .*--mode=eval |.*\.main$": (
    "main_test.py::test_train_again_and_eval"
  ),
  r".*fast_cifar10.py$": "experiments/recipes/README.md",
  r".*\.main .*--config=": HERE + "test_the_command_says_what_it_trains",
  r".*\.predict\b": "tools/predict_test.py::test_the_commands_of_the_page",
  r".*\.convert\b": "tools/convert_test.py::test_command_line",
  r".*resnet_flax\.export\b": (
    "tools/export/command_test.py::test_the_commands_of_the_page"
  ),
  r".*\.compare\b": "tools/compare_test.py::test_commands_of_the_page",
  r".*\.report\b": "tools/report/main_test.py::test_report",
  r".*experiments\.sweep\b": (
    "experiments/tools/sweep_test.py::test_depth_ablations_can_be_used"
  ),
  r".*experiments\.tpu_compile ": (
    "experiments/tools/tpu_compile_test.py::test_compiles_for_a_tpu"
  ),
  r".*experiments\.networks$": (
    "experiments/tools/networks_test.py::test_line_is_what_the_command_writes"
  ),
  r".*\.augmentations$": (
    "experiments/tools/augmentations_test.py::test_the_sheet_is_drawn"
  ),
  r".*\.run\.help_text\b": (
    "run/command_line_test.py::test_documentation_is_made_from_the_table"
  ),
  r".*\.pictures_kinds\b": (
    "data/pictures_test.py::test_the_page_has_these_kinds_and_rules"
  ),
  r".*tests\.tools\.export\.networks$": (
    "tools/export/programs_test.py::test_the_table_is_of_these_networks"
  ),
  r".*tests\.structure$": (
    "structure_test.py::test_the_reading_path_is_short_and_as_contributing_says"
  ),
}
COMMAND = re.compile(r"(python -m|pip install|uv|resnet-flax) \S")
MARK = re.compile(r"\bnot\srun\b|nothing\son\sthis\spage\shas\sbeen\srun", re.I)
# What a page says of a training that is not made.
BUILT = re.compile(r"\bonly\sbuilds\b")


def commands():
  """Each command, of a block or inside a sentence or a table, and its section.

  Text at the head of a page applies to all its sections.
  """
  for page in PAGES:
    text = page.read_text()
    head = text.partition("\n## ")[0]
    blocks = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
    for section in re.split(r"\n(?=##+ )", text):
      lines = [
        line
        for language, block in blocks.findall(section)
        for line in block.splitlines()
        if language == "sh" and not line.startswith("#")
      ]
      spans = re.findall(r"`([^`]+)`", blocks.sub("", section))
      spans = [" ".join(span.split()) for span in spans]
      lines += [span for span in spans if COMMAND.match(span)]
      for line in lines:
        yield line, head + section


ALL = list(commands())


def runner(line):
  return next((by for each, by in RUN_BY.items() if re.match(each, line)), None)


TRAINING = [
  (line, said)
  for line, said in ALL
  if runner(line) == HERE + "test_the_command_says_what_it_trains"
]


def test_a_command_is_run_or_marked():
  assert len(ALL) > 100
  assert not [
    line for line, said in ALL if not runner(line) and not MARK.search(said)
  ]


def test_a_training_that_is_not_made_is_marked():
  assert len(TRAINING) > 20
  assert not [
    line
    for line, said in TRAINING
    if not BUILT.search(said) and not MARK.search(said)
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


@pytest.mark.parametrize(
  "line",
  sorted({re.sub(r".*(?=python -m)|['\"]$", "", line) for line, _ in TRAINING}),
)
def test_the_command_says_what_it_trains(line, monkeypatch):
  """Its flags are parsed, its keys checked, its network built."""
  monkeypatch.chdir(ROOT)
  config, workdir = parse_command_line(*shlex.split(line)[2:])
  assert experiment.build(config).model.stage_sizes
  (name,) = re.findall(r"--config=configs/(\w+)", line)
  assert pathlib.PurePath(workdir).name.startswith(name)
