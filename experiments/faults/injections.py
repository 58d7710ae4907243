"""The named faults: each function injects one and checks the outcome."""

import contextlib
import datetime
import errno
import inspect
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

import numpy as np

from experiments.faults import harness
from experiments.faults.case import Case

# ResNet-8 on digits, 3 epochs of 20 steps, a checkpoint every 3 steps.
DIGITS = (
  "--config=configs/quickstart.py",
  "--config.num_epochs=3",
  "--config.dataset.train_examples=640",
  "--config.eval_batch_size=40",
  "--config.model.num_filters=8",
  "--config.checkpoint.every_steps=3",
)
# CIFAR-10 has a data cache, unlike digits. It trains one epoch of 10 steps.
CIFAR10 = (
  *DIGITS,
  "--config.dataset.name=cifar10",
  "--config.num_epochs=1",
  "--config.dataset.train_examples=320",
  "--config.eval_batch_size=500",
)
_EIGHT_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
# A signal must end a run within this time, a second signal at once.
_SECONDS_TO_STOP = 10.0
_AT_ONCE = 2.0
_SECONDS_TO_TRACE = 2.0
_NUM_FLIPPED = 3
_NUM_LOST = 10
_DISK = "16m"
_DAY = 24 * 60 * 60.0
_STEPS_PER_EPOCH = 20
_BACKWARDS = """\
import time

_now, _monotonic, _start = time.time(), time.monotonic, time.monotonic()
time.time = lambda: _now - 3600 * (_monotonic() - _start)
time.time_ns = lambda: int(1e9 * time.time())
"""
_ELSEWHERE = """\
import socket

socket.gethostname = lambda: "elsewhere"
"""


class Skipped(Exception):
  """The machine cannot inject a fault; the message names the missing part."""


def truncated_checkpoint(case: Case) -> None:
  """The largest file of the latest checkpoint loses its second half."""
  case.half_done()
  path = max(_files(harness.latest(case.workdir)), key=_size)
  os.truncate(path, _size(path) // 2)
  case.recovers("is damaged", "going back to the checkpoint of step")


def flipped_checkpoint(case: Case) -> None:
  """One byte of the latest checkpoint changes, in one file after the other."""
  case.injected = 0
  template = case.job.new_workdir()
  case.job.half_done(template)
  folder = harness.latest(template)
  files = [path.relative_to(template) for path in _files(folder)]
  state = [path for path in files if "state" in path.parts]
  order = case.rng.permutation(len(state))[:_NUM_FLIPPED]
  for path in [
    *(state[position] for position in order),
    *(path for path in files if "state" not in path.parts),
  ]:
    case.workdir = case.job.new_workdir()
    case.half_done()
    _flip(case.workdir / path, case.rng)
    case.injected += 1
    case.recovers()


def missing_manifest(case: Case) -> None:
  """The latest checkpoint loses its manifest."""
  case.half_done()
  (harness.latest(case.workdir) / "manifest.json").unlink()
  case.recovers("manifest.json is missing", "going back to the checkpoint")


def all_checkpoints_damaged(case: Case) -> None:
  """One byte of every checkpoint changes; later they are put back."""
  case.half_done(locked=False)
  originals = {}
  for folder in (case.workdir / "checkpoints").iterdir():
    path = max(_files(folder), key=_size)
    originals[path] = path.read_bytes()
    _flip(path, case.rng)
  case.refuses_unchanged("no checkpoint in", "is good")
  for path, content in originals.items():
    path.write_bytes(content)
  case.recovers()


def full_disk(case: Case) -> None:
  """The disk fills up between two checkpoints; later there is room."""
  _fill_disk(case, harness.Process.has_saved)


def full_disk_while_saving(case: Case) -> None:
  """The disk fills up while a checkpoint is written; later there is room."""
  _fill_disk(case, lambda process: process.has_saved() and process.is_saving())


def _fill_disk(
  case: Case, condition: Callable[[harness.Process], bool]
) -> None:
  with _small_disk(case.job.new_workdir()) as disk:
    case.workdir = disk / "run"
    process = case.start_until(condition)
    filler = disk / "filler"
    _fill(filler)
    case.refuses("no space left", error=case.end(process).error)
    case.latest_is_good()
    filler.unlink()
    case.recovers("resuming after step")


def read_only_workdir(case: Case) -> None:
  """The workdir becomes read-only under the run; later it is not."""
  with _small_disk(case.job.new_workdir()) as disk:
    case.workdir = disk / "run"
    process = case.start_until(harness.Process.has_saved)
    # A disk with open files cannot be remounted, but a bind mount can.
    _run("mount", "--bind", str(case.workdir), str(case.workdir))
    try:
      while not os.statvfs(case.workdir).f_flag & os.ST_RDONLY:
        # The remount fails while the run has a file open through the mount.
        _run("mount", "-o", "remount,bind,ro", str(case.workdir), check=False)
      ended = case.end(process)
    finally:
      _run("umount", "--lazy", str(case.workdir))
    case.refuses("can no longer be written", error=ended.error)
    case.latest_is_good()
    case.recovers("resuming after step")


def removed_workdir(case: Case) -> None:
  """The workdir is removed under the run."""
  process = case.start_until(harness.Process.has_saved)
  while case.workdir.exists():
    # The run may write meanwhile, so this is repeated.
    shutil.rmtree(case.workdir, ignore_errors=True)
  case.refuses("was removed or emptied", error=case.end(process).error)
  case.recovers()


def second_process(case: Case) -> None:
  """The same command is started again while it runs."""
  process = case.start_until(harness.Process.has_saved)
  case.refuses("is in use by", str(process.pid), socket.gethostname())
  case.compare(case.end(process))
  case.notes.append("the first one finishes")


def stale_lock(case: Case) -> None:
  """A killed process has left its lock."""
  pid = case.half_done()
  case.recovers(f"taking over the lock of process {pid}")


def clock_goes_back(case: Case) -> None:
  """The clock goes back a day between two starts, and goes on backwards."""
  case.half_done()
  # The files' times are then a day ahead of the clock.
  for path in (case.workdir, *case.workdir.rglob("*")):
    tomorrow = path.stat().st_mtime + _DAY
    os.utime(path, (tomorrow, tomorrow))
  lock = case.workdir / "lock"
  owner = json.loads(lock.read_text())
  since = datetime.datetime.fromisoformat(owner["since"])
  owner["since"] = str(since + datetime.timedelta(seconds=_DAY))
  lock.write_text(json.dumps(owner))
  # Python imports this module before anything else.
  folder = case.job.new_workdir()
  folder.mkdir()
  (folder / "sitecustomize.py").write_text(_BACKWARDS)
  case.recovers("resuming after step", PYTHONPATH=str(folder))


def tied_epochs(case: Case) -> None:
  """Every epoch is as good as the first, whose checkpoint is the oldest."""
  process = case.start(
    "--config.optimizer.name=sgd",
    "--config.optimizer.learning_rate=1e-30",
    "--config.model.batch_norm_momentum=0.9999999",
  )
  ended = case.end(process)
  case.expect(ended.code == 0, f"the run ended with code {ended.code}")
  best, accuracies = harness.best(case.workdir)
  case.expect(len(set(accuracies)) == 1, f"no ties: {accuracies}")
  case.keeps("the first one's checkpoint", best == _STEPS_PER_EPOCH)


def unknown_monitor(case: Case) -> None:
  """The metric that decides which epoch is best is misspelt."""
  case.half_done(locked=False)
  case.refuses_unchanged(
    "checkpoint.monitor='acuracy'",
    "Did you mean 'accuracy'",
    extra=["--config.checkpoint.monitor=acuracy"],
  )
  case.recovers()


def one_device_then_eight(case: Case) -> None:
  """A run on one device goes on on eight."""
  case.half_done()
  case.recovers("resuming after step", identical=False, **_EIGHT_DEVICES)
  case.notes.append("sums are rounded in another order")


def eight_devices_then_one(case: Case) -> None:
  """A run on eight devices goes on on one."""
  case.stop_when(
    lambda process: process.has_saved(20), signal.SIGKILL, **_EIGHT_DEVICES
  )
  case.recovers("resuming after step", identical=False)
  case.notes.append("sums are rounded in another order")


def another_models_checkpoints(case: Case) -> None:
  """The checkpoints are replaced by those of a narrower network."""
  ours, other = case.workdir, case.job.new_workdir()
  case.workdir, case.extra = other, ["--config.model.num_filters=4"]
  case.stop_when(harness.Process.has_saved, signal.SIGKILL)
  case.workdir, case.extra = ours, []
  case.half_done(locked=False)
  checkpoints, narrower = ours / "checkpoints", other / "checkpoints"
  originals = case.job.new_workdir()
  checkpoints.rename(originals)
  for unfinished in narrower.glob("*-tmp*"):
    shutil.rmtree(unfinished)
  shutil.copytree(narrower, checkpoints)
  case.refuses_unchanged(
    "holds another network: params/head/kernel is float32[16, 10] there,"
    " float32[32, 10] here"
  )
  shutil.rmtree(checkpoints)
  originals.rename(checkpoints)
  case.recovers()


def older_format(case: Case) -> None:
  """The checkpoints look like those of an older version."""
  case.half_done(locked=False)
  folders = list((case.workdir / "checkpoints").iterdir())
  for folder in folders:
    (folder / "state").rename(folder / "default")
  case.refuses_unchanged("is missing", "Nothing was changed")
  for folder in folders:
    (folder / "default").rename(folder / "state")
  case.recovers()


def truncated_data(case: Case) -> None:
  """A file of the data cache loses its second half while nothing runs."""
  path = _half_done_with_cache(case)
  os.truncate(path, _size(path) // 2)
  case.recovers("damaged", "decoding again", "resuming after step")


def altered_data(case: Case) -> None:
  """One byte of the data cache changes while nothing runs."""
  path = _half_done_with_cache(case)
  _flip(path, case.rng)
  case.recovers("damaged", "decoding again", "resuming after step")


def _half_done_with_cache(case: Case) -> pathlib.Path:
  """Starts from a half-done run; returns the file of its cached images."""
  data = os.environ.get("TFDS_DATA_DIR")
  if not data or not pathlib.Path(data, "cifar10").is_dir():
    raise Skipped("needs a prepared cifar10")
  case.half_done()
  (path,) = case.job.cache.glob("*/train_images.npy")
  return path


def not_a_number(case: Case) -> None:
  """The learning rate is absurd; nothing is to be recovered from that."""
  process = case.start(
    "--config.optimizer.name=sgd",
    "--config.optimizer.learning_rate=1e30",
    "--config.checkpoint.every_steps=1",
  )
  case.refuses("is not finite after step", error=case.end(process).error)
  described = (case.workdir / "nonfinite_step.json").exists()
  case.expect(described, "there is no nonfinite_step.json")
  case.latest_is_good()


def sigterm(case: Case) -> None:
  """SIGTERM in each phase, one start after the other on one workdir."""
  _signal_each_phase(case, signal.SIGTERM)


def sigint(case: Case) -> None:
  """SIGINT in each phase, one start after the other on one workdir."""
  _signal_each_phase(case, signal.SIGINT)


def _signal_each_phase(case: Case, number: int) -> None:
  case.injected = 0
  for phase in ("preparing", "compiling", "training", "evaluating"):
    process = case.start_until(_is_in(phase))
    if phase == "compiling":
      # Tracing is over; the interpreter is busy in XLA.
      time.sleep(_SECONDS_TO_TRACE)
    process.send(number)
    ended = case.end(process)
    case.injected += 1
    case.refuses(error=ended.error)
    code = 128 + number
    case.expect(ended.code == code, f"code {ended.code}, not {code}: {phase}")
    late = ended.seconds > _SECONDS_TO_STOP
    case.expect(not late, f"{ended.seconds:.1f} s to stop: {phase}")
    case.notes.append(f"{phase} {ended.seconds:.1f} s")
  case.recovers()


def _is_in(phase: str) -> Callable[[harness.Process], bool]:
  return lambda process: process.phase().startswith(phase)


def two_signals(case: Case) -> None:
  """A second SIGTERM comes while the first waits for the evaluation."""
  process = case.start_until(_is_in("evaluating"))
  process.send(signal.SIGTERM)
  time.sleep(0.1)  # Later than an echo; see run/signals.py.
  process.send(signal.SIGTERM)
  ended = case.end(process)
  case.refuses(error=ended.error)
  case.expect(ended.code == 128 + signal.SIGTERM, f"code {ended.code}")
  case.expect(ended.seconds < _AT_ONCE, "it did not end at once")
  case.notes.append(f"{ended.seconds:.1f} s")
  case.recovers()


# ---- Faults of the copy that `checkpoint.mirror` keeps


def _mirrored(case: Case) -> pathlib.Path:
  """Makes the command keep a mirror; returns its folder."""
  folder = case.job.new_workdir()
  case.extra = [f"--config.checkpoint.mirror={folder}"]
  return folder


def _copied(folder: pathlib.Path, count: int = 1) -> bool:
  """Whether the mirror lists at least `count` states with checkpoints."""
  lists = folder.glob("states/*.json")
  return sum('"checkpoints/' in path.read_text() for path in lists) >= count


def lost_disks(case: Case) -> None:
  """SIGKILL at random, and the workdir is gone, but for its mirror."""
  folder = _mirrored(case)
  early = case.job.reference.seconds_to_compiled
  case.injected = 0
  while case.injected < _NUM_LOST:
    process = case.start()
    wait = case.rng.uniform(0, early)
    if case.rng.random() < 0.7:
      process.wait_until(process.is_compiled)
      wait = process.age + case.rng.uniform(0, 2)
    process.wait_until_age(wait)
    process.send(signal.SIGKILL)
    ended = case.end(process)
    if ended.code == 0:
      break
    case.expect(ended.code == -signal.SIGKILL, f"code {ended.code}")
    case.injected += 1
    shutil.rmtree(case.workdir, ignore_errors=True)
  case.expect(_copied(folder), "nothing was copied")
  case.recovers("filled")


def damaged_mirror(case: Case) -> None:
  """One byte changes in the mirror's last state, and the workdir is gone."""
  folder = _mirrored(case)
  case.stop_when(lambda process: _copied(folder, 2), signal.SIGKILL)
  shutil.rmtree(case.workdir)
  before, last = (
    json.loads(path.read_text())["files"].values()
    for path in sorted(folder.glob("states/*.json"))[-2:]
  )
  _flip(
    max((folder / "files" / name for name in {*last} - {*before}), key=_size),
    case.rng,
  )
  case.recovers("is damaged", "filled", "resuming after step")


def truncated_mirror(case: Case) -> None:
  """All files of the mirror lose their second half, and the workdir is gone."""
  folder = _mirrored(case)
  case.stop_when(lambda process: _copied(folder), signal.SIGKILL)
  shutil.rmtree(case.workdir)
  for path in _files(folder / "files"):
    os.truncate(path, _size(path) // 2)
  case.refuses("holds no undamaged state")
  shutil.rmtree(folder)
  case.recovers()


def full_mirror(case: Case) -> None:
  """The mirror's disk fills up under the run; later there is room."""
  folder = _mirrored(case)
  with _small_disk(folder):
    process = case.start_until(lambda process: _copied(folder))
    filler = folder / "filler"
    _fill(filler)
    process.wait_until(lambda: "No space left" in process.messages())
    filler.unlink()
    ended = case.end(process)
    case.says(ended, "cannot be written", "trying again", "is up to date again")
    case.compare(ended)
    shutil.rmtree(case.workdir)
    case.recovers("filled")


def absent_mirror(case: Case) -> None:
  """The mirror cannot be reached at the start; later it can."""
  folder = _mirrored(case)
  folder.write_text("not a folder")
  case.refuses("cannot be used", "See that it can be reached")
  folder.unlink()
  case.recovers()


def stopped_with_mirror(case: Case) -> None:
  """SIGTERM, and what was saved then is on the mirror alone."""
  _mirrored(case)
  ended = case.stop_when(lambda process: process.has_saved(27), signal.SIGTERM)
  case.refuses("saved up to step", error=ended.error)
  step = int(harness.latest(case.workdir).name)
  shutil.rmtree(case.workdir)
  case.recovers(f"resuming after step {step} of")
  case.notes.append(f"{ended.seconds:.1f} s")


def second_machine(case: Case) -> None:
  """The same command is started on another machine while it runs."""
  folder = _mirrored(case)
  process = case.start_until(lambda process: _copied(folder))
  module = case.job.new_workdir()
  module.mkdir()
  (module / "sitecustomize.py").write_text(_ELSEWHERE)
  first, case.workdir = case.workdir, case.job.new_workdir()
  # The first run must not finish before the second one has begun.
  os.kill(process.pid, signal.SIGSTOP)
  second = case.end(case.start(PYTHONPATH=str(module)))
  os.kill(process.pid, signal.SIGCONT)
  words = "is in use by", str(process.pid), f"on {socket.gethostname()}"
  case.refuses(*words, error=second.error)
  case.workdir = first
  case.compare(case.end(process))
  case.notes.append("the first one finishes")


# Every public function is a fault. Its docstring's first line is its name in
# the table.
FAULTS: dict[str, Callable[[Case], None]] = {
  name: fault
  for name, fault in dict(globals()).items()
  if inspect.isfunction(fault) and not name.startswith("_")
}
ON_CIFAR10 = (truncated_data.__name__, altered_data.__name__)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Lists the files of a folder that are not empty, in a fixed order."""
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  return [path for path in files if _size(path)]


def _size(path: pathlib.Path) -> int:
  return path.stat().st_size


def _flip(path: pathlib.Path, rng: np.random.Generator) -> None:
  """Changes one random byte."""
  with path.open("r+b") as file:
    file.seek(int(rng.integers(_size(path))))
    (byte,) = file.read(1)
    file.seek(-1, os.SEEK_CUR)
    file.write(bytes([byte ^ int(rng.integers(1, 256))]))


def _fill(path: pathlib.Path) -> None:
  """Makes a file that fills the disk."""
  with path.open("wb", buffering=0) as file:
    try:
      while True:
        file.write(bytes(4096))
    except OSError as error:
      if error.errno != errno.ENOSPC:
        raise


@contextlib.contextmanager
def _small_disk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Mounts a disk of a few megabytes at a folder."""
  if os.geteuid():
    raise Skipped("needs root")
  folder.mkdir()
  try:
    _run("mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder))
  except (OSError, subprocess.CalledProcessError) as error:
    raise Skipped("needs the right to mount") from error
  try:
    yield folder
  finally:
    _run("umount", "--lazy", str(folder))


def _run(*command: str, check: bool = True) -> None:
  subprocess.run(command, check=check, capture_output=True)
