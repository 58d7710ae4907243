import contextlib
import importlib.util
import io
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import uuid

import numpy as np
import pytest
from rich.console import Console

from experiments.tools.sweep import (
  definition,
  estimate,
  launch,
  overview,
  scheduler,
  task,
)
from experiments.tools.sweep.overview import State
from resnet_flax.run import errors, folder, metrics, progress, signals

# How ml_collections loads config files.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)

ROOT = pathlib.Path(__file__).parents[3]
BASE = "configs/quickstart.py"
ANY = definition.Resources()
needs_ray = pytest.mark.skipif(
  importlib.util.find_spec("ray") is None, reason="needs the extra [sweep]"
)
needs_linux = pytest.mark.skipif(
  sys.platform != "linux", reason="needs Linux's prctl and sched_setaffinity"
)


@pytest.fixture
def sweep_file(tmp_path):
  """A function of names and values that makes a sweep file."""

  def make(**values):
    path = tmp_path / "sweep.py"
    values = {"CONFIG": BASE, "GRID": {"seed": [0]}, **values}
    lines = [f"{name} = {value!r}\n" for name, value in values.items()]
    path.write_text("".join(lines))
    return str(path)

  return make


@pytest.fixture
def load(sweep_file, tmp_path):
  """A function of names and values that loads such a file's sweep."""

  def load(**values):
    return definition.load(sweep_file(**values), tmp_path / "sweep", ANY)

  return load


def record(epoch, accuracy, **more):
  return {
    "epoch": epoch,
    "step": 10 * epoch + 10,
    "test_accuracy": accuracy,
    "epoch_seconds": 5.0,
    "images_per_second": 200.0,
    **more,
  }


def write_run(cell, records):
  cell.workdir.mkdir(parents=True)
  (cell.workdir / "config.json").write_text(json.dumps(cell.config.to_dict()))
  log = metrics.MetricsLog(cell.workdir)
  for each in records:
    log.append(each)


# The definition.


def test_cells_are_the_combinations_of_all_grids(load, tmp_path):
  sweep = load(
    OVERRIDES={
      "num_epochs": 4,
      "schedule.drop_percents": (50,),
      "schedule.drop_factors": [0.1],
      "augment.flip": True,
    },
    GRID=[
      {"model.depth": [8, 14], "seed": [0, 1]},
      {"model.name": ["plain"]},
    ],
    CPUS_PER_CELL=1,
  )
  assert [cell.name for cell in sweep.cells] == [
    "quickstart,model.depth=8,seed=0",
    "quickstart,model.depth=8,seed=1",
    "quickstart,model.depth=14,seed=0",
    "quickstart,model.depth=14,seed=1",
    "quickstart,model.name=plain",
  ]
  assert sweep.resources == definition.Resources(1, None)
  cell = sweep.cells[2]
  assert cell.workdir == tmp_path / "sweep" / cell.name
  assert cell.log == tmp_path / "sweep" / f"{cell.name}.log"
  assert cell.arguments == (
    "--config=configs/quickstart.py",
    "--config.num_epochs=4",
    "--config.schedule.drop_percents=(50,)",
    "--config.schedule.drop_factors=(0.1,)",
    "--config.augment.flip=true",
    "--config.model.depth=14",
    "--config.seed=0",
  )
  assert (cell.config.num_epochs, cell.config.model.depth) == (4, 14)
  assert cell.config.schedule.drop_factors == (0.1,)
  assert cell.config.augment.flip
  assert not (tmp_path / "sweep").exists()


def test_flags_come_before_the_file(sweep_file, tmp_path):
  path = sweep_file(CPUS_PER_CELL=1, GPUS_PER_CELL=2)
  given = definition.Resources(None, 0)
  sweep = definition.load(path, tmp_path, given)
  assert sweep.resources == definition.Resources(1, 0)


@pytest.mark.parametrize(
  ("values", "words"),
  [
    ({"GRID": {"model.dept": [8]}}, ["model.dept=8", "'model.depth'"]),
    ({"OVERRIDES": {"sed": 1}}, ["cell quickstart,seed=0", "'seed'"]),
    ({"GRID": {"model.depth": [8, 9]}}, ["model.depth=9:", "model.depth=9"]),
    ({"GRID": {"seed": [0, "x"]}}, ["cell quickstart,seed=x", "config.seed=x"]),
    ({"GRID": {"batch_size": [0]}}, ["batch_size=0:", "an integer from 1"]),
    ({"GRID": {"seed": [0, 1, 0]}}, ["quickstart,seed=0 is the same run"]),
    ({"GRID": [{"seed": [0]}, {"batch_size": [32]}]}, ["batch_size=32 is the"]),
    ({"GRID": {"seed": []}}, ["GRID={'seed': []}", "at least one value"]),
    ({"GRID": {"seed": 3}}, ["GRID={'seed': 3}", "lists"]),
    ({"GRID": 3}, ["GRID=3"]),
    ({"GRID": []}, ["GRID=[]", "at least one cell"]),
    ({"OVERRIDES": {"seed": 1}}, ["seed is both in OVERRIDES and in GRID"]),
    ({"OVERRIDES": 3}, ["OVERRIDES=3", "a dictionary"]),
    ({"CONFIG": "configs/none.py"}, ["CONFIG='configs/none.py'"]),
    ({"OVERIDES": {}}, ["'OVERIDES'", "Did you mean 'OVERRIDES'?"]),
    ({"CPUS_PER_CELL": 0}, ["CPUS_PER_CELL=0", "an integer from 1"]),
    ({"GPUS_PER_CELL": 0.5}, ["GPUS_PER_CELL=0.5", "an integer from 0"]),
    ({"GPUS_PER_CELL": 3}, ["batch_size=32", "3 devices"]),
  ],
)
def test_mistakes_are_named(load, values, words):
  with pytest.raises(errors.ConfigError) as caught:
    load(**values)
  for word in words:
    assert word in str(caught.value)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    (None, "there is no such file"),
    ("GRID = {}", "must set CONFIG"),
    ("CONFIG = 'configs/quickstart.py'", "must set GRID"),
    ("1 / 0", "fails: ZeroDivisionError"),
    ("raise SystemExit('no')", "fails: SystemExit: no"),
    ("CONFIG = ", "fails: SyntaxError"),
  ],
)
def test_a_broken_file_is_named(tmp_path, text, words):
  path = tmp_path / "sweep.py"
  if text is not None:
    path.write_text(text)
  with pytest.raises(errors.ConfigError, match=words) as caught:
    definition.load(str(path), tmp_path, ANY)
  assert str(path) in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("1 / 0", "ZeroDivisionError"),
    ("def get_config(): return 3", "returns int"),
    ("def get_config(): raise SystemExit('no')", "SystemExit: no"),
  ],
)
def test_a_broken_config_is_named(load, tmp_path, text, words):
  path = tmp_path / "config.py"
  path.write_text(text)
  with pytest.raises(errors.ConfigError, match=f"CONFIG={path}: .*{words}"):
    load(CONFIG=str(path))


@pytest.mark.parametrize(
  ("name", "networks"),
  [
    ("degradation", {("plain", 20), ("plain", 56), ("resnet_v1", 20)}),
    ("he2015", {("plain", 110), ("resnet_v1", 32), ("resnet_v1", 110)}),
    ("keras", {("resnet_v1", 110), ("resnet_v2", 56), ("resnet_v2", 110)}),
  ],
)
def test_depth_ablations_can_be_used(tmp_path, name, networks):
  path = f"experiments/depth_ablation/{name}.py"
  cells = definition.load(path, tmp_path, ANY).cells
  models = [cell.config.model for cell in cells]
  assert networks < {(model.name, model.depth) for model in models}


SWEEPS = [
  path
  for path in (ROOT / "experiments").glob("*/*.py")
  if "\nGRID = " in path.read_text()
]


@pytest.mark.parametrize("path", SWEEPS)
def test_every_sweep_of_the_experiments_can_be_used(path, tmp_path):
  assert len(SWEEPS) > 5
  assert definition.load(str(path), tmp_path, ANY).cells


# What it will cost.


def test_every_view_of_each_scored_image_costs(tiny_config):
  def forward_passes():
    size = estimate._size(tiny_config)
    return estimate._flops_of_epoch(tiny_config) / (2 * size.multiply_adds)

  assert forward_passes() == 3 * 32 + 360
  tiny_config.dataset.test_crops = 2
  assert forward_passes() == 3 * 32 + 2 * 360
  tiny_config.eval_every_epochs = 2
  tiny_config.num_seeds = 3
  assert forward_passes() == 3 * (3 * 32 + 360)
  tiny_config.ema.decay = 0.9
  assert forward_passes() == 3 * (3 * 32 + 2 * 360)


def test_costs_by_hand(load, monkeypatch):
  sweep = load(
    OVERRIDES={"num_epochs": 4, "dataset.train_examples": 100},
    GRID={"model.num_filters": [4, 8], "seed": [0, 1]},
  )
  small, again, large, _ = sweep.cells
  monkeypatch.setattr(estimate, "rate_now", lambda cells, gpus: 1e7)
  here = estimate.table(sweep.cells, [])
  assert "at 0.0 GFLOP/s, measured here in some steps of the smallest" in here
  assert "--measured=WORKDIR" in here
  write_run(small, [record(0, 0.5), record(1, 0.6)])
  rows = [line.split() for line in estimate.table(sweep.cells, []).splitlines()]
  madds = [int(row[2].replace(",", "")) / 2 for row in rows[1:5]]
  assert madds[0] == madds[1] < madds[2] == madds[3]
  assert [row[0] for row in rows[1:5]] == ["2/4", "0/4", "0/4", "0/4"]
  # 3 steps of 32 images, in training three times a forward pass, and 360 of
  # the test split, at the images/s of the run that was measured.
  epoch = (3 * 96 + 360) / (3 * 200.0)
  for row, count, cell in zip(
    rows[1:5],
    (2, 4, 4, 4),
    sweep.cells,
    strict=True,
  ):
    assert row[3] == "384"
    seconds = count * epoch * madds[sweep.cells.index(cell)] / madds[0]
    assert row[5] == f"0:00:{round(seconds):02d}"
    assert row[6] == cell.name
  # As fast per FLOP, but measured elsewhere.
  text = estimate.table([again, large], [small.workdir])
  assert [line.split()[5] for line in text.splitlines()[1:3]] == [
    row[5] for row in rows[2:4]
  ]
  write_run(again, [])
  with pytest.raises(errors.WorkdirError, match="one finished epoch"):
    estimate.table(sweep.cells, [again.workdir])


def test_speed_is_that_of_the_smallest_cell_where_none_is_known(
  load, monkeypatch
):
  cells = load(GRID={"model.num_filters": [8, 4]}).cells
  now = [0.0]
  prepared = []

  class Prepared:
    def repeat(self, steps):
      now[0] += 0.5 * steps

  def prepare(config, split, devices):
    images, labels = split.take(np.arange(len(split)))
    assert images.shape == (config.batch_size, 32, 32, 3)
    assert set(labels) == set(range(10))
    assert len(devices) == 2
    prepared.append(config.model.num_filters)
    return Prepared()

  monkeypatch.setattr(estimate.timing, "prepare", prepare)
  monkeypatch.setattr(estimate.time, "perf_counter", lambda: now[0])
  small = cells[1].config
  flops = 6 * estimate._size(small).multiply_adds * small.batch_size
  assert estimate.rate_now(cells, 2) == pytest.approx(flops / 0.5)
  assert prepared == [4]


# Where cells stand.


def test_finished_is_every_epoch_of_the_same_run(load):
  (cell,) = load(OVERRIDES={"num_epochs": 2}).cells
  assert not overview.is_finished(cell)
  write_run(cell, [record(0, 0.5)])
  assert not overview.is_finished(cell)
  last = record(1, 0.6)
  metrics.MetricsLog(cell.workdir).append(last)
  assert overview.is_finished(cell)  # Its checkpoints were removed.
  # A killed run may lack the checkpoint of its last record.
  checkpoints = cell.workdir / "checkpoints"
  (checkpoints / str(record(0, 0.5)["step"])).mkdir(parents=True)
  assert not overview.is_finished(cell)
  (checkpoints / str(last["step"])).mkdir()
  assert overview.is_finished(cell)
  (other,) = load(OVERRIDES={"num_epochs": 2, "batch_size": 8}).cells
  with pytest.raises(errors.WorkdirError, match=r"seed=0: .* batch_size"):
    overview.is_finished(other)


def test_status_is_read_from_the_files(load, caplog):
  (cell,) = load(OVERRIDES={"num_epochs": 3}).cells
  cell.log.parent.mkdir()
  cell.log.write_text(f"{task.STARTED}somewhere\nfrom long ago, 9:00:00 left\n")
  observer = overview.Observer([cell])
  status = observer.status(cell, None)
  assert (status.state, status.tries, status.left) == (State.WAITING, 0, "")
  # What the cell's own progress says.
  shown = progress.Progress(cell.config, 10)
  with cell.log.open("a") as file:
    handler = logging.StreamHandler(file)
    logger = logging.getLogger("resnet_flax")
    logger.addHandler(handler)
    caplog.set_level(logging.INFO, "resnet_flax")
    print(f"{task.STARTED}one\n{task.STARTED}two", file=file, flush=True)
    last = record(0, 0.75, train_loss=1.0, train_accuracy=0.5, test_loss=1.0)
    shown.start_epoch(0, 0)
    shown._seconds_per_step = 6.0
    shown.end_epoch(last | {"evaluation_seconds": 2.0})
    logger.removeHandler(handler)
  write_run(cell, [last, record(1, 0.7, test_accuracy_std=0.01)])
  status = observer.status(cell, None)
  assert (status.state, status.tries) == (State.RUNNING, 2)
  assert status.left == shown._left()
  assert ":" in status.left
  assert status.row("x") == (
    *("running", "2", "2/3", "0.7000 ± 0.0100", "0.7500", "200"),
    *(status.left, "x"),
  )
  assert status.line("x") == (
    "x: running (try 2), epochs 2/3, test accuracy 0.7000 ± 0.0100,"
    f" 200 images/s, {status.left} left"
  )
  ended = observer.status(cell, State.FAILED)
  assert (ended.state, ended.left) == (State.FAILED, "")
  assert observer.last_line(cell).endswith("left")


def statuses(*states):
  return {
    f"cell{index}": overview.Status(state, 1, 2, (), None, "")
    for index, state in enumerate(states)
  }


def test_a_line_for_each_change():
  out = io.StringIO()
  with overview.Overview(Console(file=out)) as shown:
    shown.show(statuses(State.WAITING, State.WAITING))
    shown.show(statuses(State.RUNNING, State.WAITING))
    shown.show(statuses(State.RUNNING, State.WAITING))
  assert out.getvalue().splitlines() == [
    "cell0: waiting, epochs 0/2",
    "cell1: waiting, epochs 0/2",
    "cell0: running, epochs 0/2",
  ]


def test_a_table_on_a_terminal():
  out = io.StringIO()
  console = Console(file=out, force_terminal=True, width=100, height=20)
  with overview.Overview(console) as shown:
    shown.show(statuses(State.FINISHED, State.RUNNING))
  text = out.getvalue()
  assert "2 cells: 1 running, 1 finished" in text
  assert text.index("cell1") < text.index("cell0")


# What a cell is given.


@pytest.mark.parametrize(
  ("wanted", "nodes", "found"),
  [
    ((None, None), [{"CPU": 8.0}], (8, 0)),
    ((2, None), [{"CPU": 8.0}], (2, 0)),
    ((None, None), [{"CPU": 8.0, "GPU": 4.0}], (2, 1)),
    ((None, 2), [{"CPU": 8.0, "GPU": 4.0}], (4, 2)),
    ((None, 0), [{"CPU": 8.0, "GPU": 4.0}], (8, 0)),
    # The head of a cluster often has none to give.
    ((None, None), [{}, {"CPU": 4.0}, {"CPU": 2.0}], (2, 0)),
    ((None, None), [{"CPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}], (8, 1)),
    ((None, 1), [{"CPU": 1.0, "GPU": 4.0}], (1, 1)),
  ],
)
def test_resources(wanted, nodes, found):
  resources = definition.Resources(*wanted)
  assert scheduler.choose_resources(resources, nodes) == found


@pytest.mark.parametrize("wanted", [(9, None), (None, 2), (8, 1)])
def test_resources_that_no_machine_has(wanted):
  nodes = [{"CPU": 8.0}, {"CPU": 4.0, "GPU": 1.0}]
  with pytest.raises(errors.ConfigError, match="one of 8 CPUs and 0 GPUs"):
    scheduler.choose_resources(definition.Resources(*wanted), nodes)


@needs_linux
def test_cells_have_cores_of_their_own(tmp_path):
  if len(os.sched_getaffinity(0)) < 2:
    pytest.skip("needs two cores")
  code = (
    "import os, pathlib, sys\n"
    "from experiments.tools.sweep import launch\n"
    "launch.take_cores(1, pathlib.Path(sys.argv[1]))\n"
    "os.execlp('sh', 'sh', '-c', 'taskset -p $$; read _')"
  )
  command = [sys.executable, "-c", code, str(tmp_path / "cores")]
  with contextlib.ExitStack() as stack:
    masks = []
    for _ in range(2):
      process = stack.enter_context(
        subprocess.Popen(
          command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
      )
      masks.append(int(process.stdout.readline().split()[-1], 16))
  assert all(mask.bit_count() == 1 for mask in masks)
  assert masks[0] != masks[1]
  # Free again; and with all cores nothing is kept to any.
  before = os.sched_getaffinity(0)
  launch.take_cores(len(before), tmp_path / "none")
  assert os.sched_getaffinity(0) == before
  assert not (tmp_path / "none").exists()


@needs_linux
def test_a_cell_ends_with_its_worker(tmp_path):
  program = "import time; print(1, flush=True); time.sleep(60)"
  worker = (
    "import os, subprocess, sys, time\n"
    "subprocess.Popen([sys.executable, '-m', 'experiments.tools.sweep.launch',"
    f" str(os.getpid()), '999', '-c', {program!r}])\n"
    "time.sleep(60)"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", worker], stdout=subprocess.PIPE, cwd=ROOT
  )
  with process:
    assert process.stdout.readline() == b"1\n"
    process.kill()
    # Held open by the cell.
    assert process.stdout.read() == b""


@pytest.fixture
def fake_python(tmp_path, monkeypatch):
  """A function of a shell script that is run in the place of a cell."""

  def make(script):
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))

  return make


def run_task(workdir):
  log = workdir.with_name("cell.log")
  return task.run(["--some=flag"], workdir, log, ROOT, 1, 0), log.read_text()


def test_a_task_gives_the_exit_code_and_keeps_the_output(tmp_path, fake_python):
  fake_python('echo "$@"; echo "gpus <$CUDA_VISIBLE_DEVICES>" >&2; exit 3')
  code, log = run_task(tmp_path / "cell")
  assert code == 3
  lines = log.splitlines()
  assert lines[0].startswith(task.STARTED)
  assert lines[1].startswith(
    f"-m experiments.tools.sweep.launch {os.getpid()} 1 -m"
  )
  assert lines[1].endswith(f"--some=flag --workdir={tmp_path}/cell")
  assert lines[2] == "gpus <>"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_cell_has_died(tmp_path, fake_python, number):
  fake_python(f"kill -{number.value} $$")
  with pytest.raises(task.Died, match=f"killed by {number.name}"):
    run_task(tmp_path / "cell")


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_cell_that_stopped_by_itself_has_died(tmp_path, fake_python, number):
  fake_python(f"exit {128 + number}")
  name = signal.Signals(number).name
  with pytest.raises(task.Died, match=f"killed by {name}"):
    run_task(tmp_path / "cell")


def test_an_interrupted_task_asks_the_cell_to_stop(tmp_path, fake_python):
  fake_python("trap 'echo saved; exit 143' TERM; echo up; sleep 60 & wait")
  log = tmp_path / "cell.log"

  def interrupt():
    while not log.exists() or "up" not in log.read_text():
      time.sleep(0.01)
    signal.raise_signal(signal.SIGINT)

  before = signal.getsignal(signal.SIGINT)
  thread = threading.Thread(target=interrupt)
  thread.start()
  code, text = run_task(tmp_path / "cell")
  thread.join()
  assert code == 143
  assert signal.getsignal(signal.SIGINT) is before
  assert text.endswith("saved\n")


def test_a_task_waits_for_the_process_before(tmp_path, fake_python):
  workdir = tmp_path / "cell"
  workdir.mkdir()
  fake_python(f"test ! -e {workdir}/lock")
  locked = threading.Event()

  def process_before():
    with folder.exclusive(workdir):
      locked.set()
      time.sleep(0.3)

  thread = threading.Thread(target=process_before)
  thread.start()
  locked.wait()
  code, _ = run_task(workdir)
  thread.join()
  assert code == 0


# The command line, and Ray.

QUICK = {
  "dataset.train_examples": 320,
  "batch_size": 8,
  "model.num_filters": 4,
  "eval_batch_size": 360,
  "log.tensorboard": False,
  "checkpoint.every_steps": 2,
}


@pytest.fixture
def marked(monkeypatch):
  """Marks what is started from here on; none of it is there at the end."""
  mark = f"SWEEP_TEST_{uuid.uuid4().hex}"
  monkeypatch.setenv(mark, "1")
  yield

  def left():
    for path in pathlib.Path("/proc").glob("[0-9]*"):
      with contextlib.suppress(OSError):
        ours = int(path.name) == os.getpid()
        if not ours and mark.encode() in (path / "environ").read_bytes():
          yield path.name

  end = time.monotonic() + 30
  while list(left()) and time.monotonic() < end:
    time.sleep(0.1)
  assert not list(left())


@pytest.fixture
def start():
  """A function of arguments that starts the command line."""
  processes = []

  def start(*arguments):
    processes.append(
      subprocess.Popen(
        [sys.executable, "-m", "experiments.sweep", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
    return processes[-1]

  yield start
  # Of a test that failed; what it had started ends with it.
  for process in processes:
    process.kill()
    process.communicate()


def end(process):
  """Exit code, lines of output, lines of messages."""
  out, err = process.communicate(timeout=300)
  return process.returncode, out.splitlines(), err.splitlines()


def wait_for_checkpoint(cell):
  """Waits until the first steps are saved; gives the process's number."""
  deadline = time.monotonic() + 300
  while not any((cell.workdir / "checkpoints").glob("[1-9]*[0-9]")):
    assert time.monotonic() < deadline
    time.sleep(0.02)
  return json.loads((cell.workdir / "lock").read_text())["pid"]


def parent_of(pid):
  stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  # After the name, which may hold anything: the state, the parent.
  return int(stat.rpartition(")")[2].split()[1])


def test_a_mistake_is_one_line(tmp_path, start):
  code, out, err = end(start("--sweep=none.py", f"--workdir={tmp_path}/new"))
  assert (code, out) == (2, [])
  assert err == [
    "error: --sweep=none.py: there is no such file. Pass a sweep file, for"
    " example experiments/depth_ablation/degradation.py."
  ]
  assert not (tmp_path / "new").exists()


def test_ray_that_is_not_there_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "ray", None)
  with (
    pytest.raises(errors.UserError, match=r"\.\[sweep\]"),
    scheduler.connect(""),
  ):
    pass


@pytest.mark.slow
@needs_ray
@needs_linux
@pytest.mark.usefixtures("marked")
def test_stop_and_go_on_beside_a_cell_that_fails(load, tmp_path, start):
  sweep = {
    "OVERRIDES": {**QUICK, "num_epochs": 3},
    "GRID": [{"init_from": ["nowhere"]}, {"seed": [0]}],
  }
  failing, good = load(**sweep).cells
  arguments = (f"--sweep={tmp_path}/sweep.py", f"--workdir={tmp_path}/sweep")
  process = start(*arguments)
  wait_for_checkpoint(good)
  process.send_signal(signal.SIGTERM)
  code, _, err = end(process)
  assert code == 143
  assert err[-1] == (
    "error: stopped by SIGTERM; 2 cells: 1 failed, 1 stopped. The same command"
    " resumes from there."
  )
  # Nothing of Ray's among them.
  assert all(
    line.startswith((failing.name, good.name, "error: ")) for line in err
  )
  assert "error: stopped by SIGTERM; saved up to" in good.log.read_text()
  code, out, err = end(start(*arguments))
  assert code == 1
  assert f"{failing.name} failed: error: init_from=nowhere" in "\n".join(out)
  assert out[-1] == "2 cells: 1 failed, 1 finished"
  assert err[-1].startswith("error: 1 of 2 cells failed")
  assert "resuming after step" in good.log.read_text()
  assert overview.is_finished(good)
  # A part of the sweep; nothing is left to be done, so that none is started.
  size = good.log.stat().st_size
  load(OVERRIDES=sweep["OVERRIDES"])
  code, out, err = end(start(*arguments))
  assert (code, out[-1], err) == (0, "1 cells: 1 finished", [])
  assert good.log.stat().st_size == size


@pytest.fixture
def cluster_address(marked, monkeypatch):
  """The address of a Ray cluster whose two nodes have a CPU each."""
  monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
  monkeypatch.setenv("RAY_worker_niceness", "0")
  process = subprocess.Popen(
    [sys.executable, "-m", "tests.experiments.tools.ray_cluster"],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  lines = iter(process.stdout.readline, "")
  yield next(
    line.strip().removeprefix("address=")
    for line in lines
    if line.startswith("address=")
  )
  process.communicate(timeout=60)


@pytest.mark.slow
@needs_ray
@needs_linux
def test_a_node_that_dies(load, tmp_path, start, cluster_address):
  """Its cells resume on another node from their checkpoints; no other stops."""
  cell, other = load(
    OVERRIDES={**QUICK, "num_epochs": 3},
    GRID={"seed": [0, 1]},
    CPUS_PER_CELL=1,
  ).cells
  process = start(
    f"--sweep={tmp_path}/sweep.py",
    f"--workdir={tmp_path}/sweep",
    f"--address={cluster_address}",
  )
  worker = parent_of(wait_for_checkpoint(cell))
  # Both at once, as with a machine; the cell hears of its worker's death.
  for pid in (parent_of(worker), worker):
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)
  code, out, err = end(process)
  assert code == 0, err
  assert out[-1] == "2 cells: 2 finished"
  assert overview.is_finished(cell)
  assert overview.is_finished(other)
  assert other.log.read_text().count(task.STARTED) == 1
  log = cell.log.read_text()
  assert log.count(task.STARTED) == 2
  first, second = log.split(task.STARTED)[1:]
  # At once if the worker's own end reaches it as a second signal.
  assert "error: stopped " in first
  assert "resuming after step" in second
  assert f"{cell.name}: running (try 2)" in "\n".join(err)
