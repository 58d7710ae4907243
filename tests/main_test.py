"""The command line as users call it: one process for each command."""

import functools
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT, run_module

QUICK = [
  "--config=configs/quickstart.py",
  "--config.num_epochs=1",
  "--config.dataset.train_examples=64",
  "--config.model.num_filters=4",
]


def command(*arguments):
  return [sys.executable, "-m", "resnet_flax.main", *map(str, arguments)]


run = functools.partial(run_module, "resnet_flax.main")


def test_train_again_and_eval(tmp_path):
  first = run(*QUICK, f"--workdir={tmp_path}/run")
  assert first.returncode == 0, first.stderr
  lines = first.stdout.splitlines()
  assert lines[0] == "Last epoch: 0 (0-based)"
  assert lines[1].startswith("Test loss: ")
  assert lines[2].startswith("Test accuracy: 0.")
  assert lines[3].startswith("Test top-5 accuracy: 0.")
  assert lines[4].startswith("Best epoch: 0 (0-based), test accuracy 0.")
  assert lines[4].endswith("chosen on the test split")
  assert len(lines) == 9
  assert lines[5] == f"Run: {tmp_path}/run"
  for text, line in zip(
    ("eval", "report", "load_model"), lines[6:], strict=True
  ):
    assert text in line
  assert "chosen on the test split, as in the recipe" in first.stderr
  again = run(*QUICK, f"--workdir={tmp_path}/run")
  assert again.stdout == first.stdout
  assert "is finished: 1 epochs" in again.stderr
  scored = run(
    "--mode=eval", f"--workdir={tmp_path}/run", "--checkpoint=latest"
  )
  assert scored.stdout.splitlines() == [
    "Checkpoint: latest, step 2, epoch 0 (0-based)",
    *lines[1:4],
  ]


@pytest.mark.slow
def test_default_workdir_and_another_configuration_in_it(tmp_path):
  """The command runs in a copy of configs, since it writes to runs/ there."""
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  assert run(*QUICK, cwd=tmp_path).returncode == 0
  (workdir,) = (tmp_path / "runs").iterdir()
  assert workdir.name == (
    "quickstart,dataset.train_examples=64,model.num_filters=4,num_epochs=1"
  )
  # What training derives, scoring finds.
  scored = run("--mode=eval", *QUICK, cwd=tmp_path)
  assert scored.stdout.startswith("Checkpoint: best, ")
  crops = ("--config.dataset.test_crops=2", f"--workdir={workdir}")
  views = run("--mode=eval", "--split=train", *QUICK, *crops)
  assert views.stdout.splitlines()[1].startswith("Train loss: "), views.stderr
  other = run(*QUICK, "--config.seed=3", f"--workdir={workdir}")
  assert other.returncode == 1
  assert "seed (0 there, 3 here)" in other.stderr


@pytest.mark.parametrize(
  "arguments",
  [["--help"], ["--config=configs/v2_depth29.py", "--mode=summary"]],
)
def test_output_may_be_cut_short(arguments):
  process = subprocess.Popen(
    command(*arguments),
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  process.stdout.close()
  _, stderr = process.communicate(timeout=60)
  assert stderr == ""
  assert process.returncode == 0


def test_summary():
  result = run("--config=configs/v2_depth29.py", "--mode=summary")
  assert "Total parameters: 849,002" in result.stdout
  assert result.stderr == ""


@pytest.mark.parametrize(
  ("arguments", "code", "message"),
  [
    (
      ["--config=configs/v1_depth20.py", "--config.model.dept=20"],
      2,
      "Did you mean 'model.depth'",
    ),
    (["--mode=eval"], 2, "--mode=eval needs only --workdir"),
    (
      ["--mode=eval", "--config=configs/quickstart.py", "--config.seed=99"],
      1,
      "runs/quickstart,seed=99 is not the workdir of a run",
    ),
    (["--flagfile=/nonexistent/flags"], 2, "/nonexistent/flags"),
    (
      [
        "--config=configs/v1_depth20.py",
        "--config.dataset.archive=missing.tar.gz",
        "--config.dataset.data_dir={tmp}",
        "--workdir={tmp}/run",
      ],
      1,
      "missing.tar.gz",
    ),
  ],
)
def test_mistakes_end_in_one_line(arguments, code, message, tmp_path):
  """`command_line_test` has the others, within its process."""
  result = run(*[argument.format(tmp=tmp_path) for argument in arguments])
  assert result.returncode == code
  assert result.stdout == ""
  last = result.stderr.splitlines()[-1]
  assert last.startswith("error: ")
  assert message in last
  assert "Traceback" not in result.stderr


def test_the_script_itself_works(tmp_path):
  """Python looks for modules beside it, where the configurations are, too."""
  (tmp_path / "resnet_flax").symlink_to(ROOT / "resnet_flax")
  result = subprocess.run(
    [
      *(sys.executable, "resnet_flax/main.py", "--mode=summary"),
      "--config=configs/quickstart.py",
    ],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(tmp_path)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert result.returncode == 0, result.stderr
  assert "Total parameters" in result.stdout


WITHOUT_JAX = """
import runpy, sys
sys.modules["jax"] = None
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
  ("module", "shown", "hidden"),
  [
    ("resnet_flax.main", ["--mode=train", "model.depth=20"], []),
    ("resnet_flax.report", ["--checkpoints"], ["--config", "model.depth"]),
  ],
)
def test_help_needs_no_jax(module, shown, hidden):
  result = subprocess.run(
    [sys.executable, "-c", WITHOUT_JAX, module, "--help"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (result.returncode, result.stderr) == (0, "")
  words = result.stdout.split()
  assert module in words
  assert set(shown) <= set(words)
  assert not set(hidden) & set(words)


def test_help_of_convert():
  result = run_module("resnet_flax.convert", "--help")
  assert (result.returncode, result.stderr) == (0, "")
  lines = result.stdout.splitlines()
  assert {"  --source", "  --workdir", "  --config"} <= set(lines)
  assert "  model.depth=20" in lines
  assert "  --mode=train" not in lines


# Its programs can be kept in the tests' compilation cache.
COMPILED_BEFORE = """
from resnet_flax import main
from resnet_flax.models.kernels import onednn
from resnet_flax.run import checkpoint
onednn.enabled = False
"""
LYING_DISK = "checkpoint.SPACE_FACTOR = 0  # As when others fill it meanwhile."


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["", LYING_DISK])
def test_full_disk_is_one_line(small_disk, disk):
  process = subprocess.Popen(
    [
      *(sys.executable, "-c", f"{COMPILED_BEFORE}{disk}\nmain.run()"),
      *(*QUICK, "--config.num_epochs=1000"),
      f"--workdir={small_disk.folder}/run",
    ],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline and not list(
    small_disk.folder.glob("run/checkpoints/[0-9]*/manifest.json")
  ):
    time.sleep(0.01)
  small_disk.fill()
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 1
  lines = stderr.splitlines()
  assert lines[-1].startswith("error: ")
  assert "no space left" in lines[-1]
  assert "Traceback" not in stderr
  assert "Warning" not in stderr


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
  ("number", "code"),
  [
    (signal.SIGTERM, 143),
    (signal.SIGHUP, 129),
    (signal.SIGUSR1, 138),
    (signal.SIGINT, 130),
  ],
)
def test_a_signal_says_where_the_run_stands(tmp_path, number, code):
  process = subprocess.Popen(
    [
      *(sys.executable, "-c", f"{COMPILED_BEFORE}main.run()"),
      *(*QUICK, "--config.num_epochs=1000", f"--workdir={tmp_path}"),
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  log = tmp_path / "metrics.jsonl"
  deadline = time.monotonic() + 120
  while not log.exists() and time.monotonic() < deadline:
    time.sleep(0.05)
  process.send_signal(number)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == code
  last = stderr.splitlines()[-1]
  assert last.startswith(f"error: stopped by {number.name}; saved up to step ")
  assert "The same command resumes from there." in last
  assert "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("moment", ["note:", "compiling"])
def test_ctrl_c_before_training(tmp_path, moment):
  """While XLA compiles, also in threads that outlive the exception."""
  process = subprocess.Popen(
    command(*QUICK, "--config.model.depth=20", f"--workdir={tmp_path}"),
    cwd=ROOT,
    env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},
    stderr=subprocess.PIPE,
    text=True,
  )
  lines = []
  for line in process.stderr:
    lines.append(line)
    if line.startswith(moment):
      process.send_signal(signal.SIGINT)
  process.wait(timeout=60)
  process.stderr.close()
  assert process.returncode == 130
  assert lines[-1].startswith("error: stopped ")
  assert "has no saved step: the command starts again." in lines[-1]
  assert not [line for line in lines if "Traceback" in line]


def test_an_error_does_not_wait_for_threads_of_libraries():
  """Orbax, for example, has threads when a workdir becomes read-only."""
  code = """
import threading
from absl import app
from resnet_flax import main
from resnet_flax.run import errors
def fail(*args, **kwargs):
  threading.Thread(target=threading.Event().wait).start()
  raise errors.WorkdirError("it is read-only")
app.run = fail
main.run()
"""
  result = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert result.returncode == 1
  assert result.stderr == "error: it is read-only\n"
