"""The folder of one run: its name, its files, and who may use it."""

import contextlib
import datetime
import errno
import glob
import hashlib
import json
import logging
import os
import pathlib
import re
import socket
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import filelock
import jax
from ml_collections import ConfigDict

from resnet_flax.data import types
from resnet_flax.optim import schedules
from resnet_flax.run import (
  config as config_lib,
  environment,
  errors,
  files,
  keys,
  metrics,
)

_logger = logging.getLogger(__name__)

_MAX_NAME = 120
# Keys of config.json, perhaps edited, that are read before `rules.check`.
_READ_UNCHECKED = (
  *("num_epochs", "num_seeds", "eval_every_epochs"),
  *("checkpoint.monitor", "schedule.decay_percent"),
)
# Errors of flock on file systems without locks, such as some network drives.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_PATIENCE = 0.2  # Seconds that an ending process may take to remove its lock.


def default_name(config_path: str, overrides: dict[str, Any]) -> str:
  """A name made of config and flat overrides: 'v1_depth20,model.depth=56'."""
  # A path may have bytes that are not text.
  path = config_path.encode(errors="backslashreplace").decode()
  parts = [pathlib.Path(path.partition(":")[0]).stem]
  try:
    parts += [f"{key}={value}" for key, value in sorted(overrides.items())]
  except ValueError:  # An integer of thousands of digits: no key takes it.
    return "refused"
  name = ",".join(parts)
  readable = re.sub(r"[^\w.,=+-]", "_", name)[:_MAX_NAME]
  if readable == name:
    return name
  # Characters were replaced or cut off: a digest keeps such names different.
  digest = hashlib.sha256(name.encode()).hexdigest()[:8]
  return f"{readable},{digest}"


# ---- Who may use the folder


@contextlib.contextmanager
def use(workdir: pathlib.Path, config: ConfigDict) -> Iterator[None]:
  """Makes the workdir, checks that this run may use it, and locks it.

  A new folder is removed at the end if it is empty.
  """
  check_name(workdir)
  try:
    made = not workdir.exists()
    workdir.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=workdir).close()
  except OSError as error:
    raise errors.WorkdirError(
      f"workdir {workdir} cannot be written: {error.strerror}. Pass another"
      " one with --workdir."
    ) from error
  if (workdir / "config.json").exists():
    check_same(workdir, config)
  # Not pathlib's glob, which also finds the .mirror-* of a killed run.
  elif runs := sorted(glob.glob("*/config.json", root_dir=workdir)):
    raise errors.WorkdirError(
      f"workdir {workdir} holds other runs' workdirs, such as"
      f" {os.path.dirname(runs[0])}. Pass a workdir for this run, such as"
      f" --workdir={workdir}/NAME."
    )
  try:
    with exclusive(workdir):
      # Again: the process that held the lock may have begun a run meanwhile.
      if (workdir / "config.json").exists():
        check_same(workdir, config)
      yield
  finally:
    if made:
      with contextlib.suppress(OSError):
        workdir.rmdir()


def check_name(workdir: pathlib.Path, flag: str = "--workdir") -> None:
  """Checks that checkpoints in this folder can be read again.

  Orbax reads a '[' as a pattern and would miss files. TensorStore reads 'gs:'
  as a bucket and a backslash as a folder, and would write elsewhere.
  """
  path = str(workdir.absolute())
  # Surrogates stand for bytes that are not UTF-8.
  if re.search("[\\[\ud800-\udfff]", path) or not errors.is_local(path):
    raise errors.WorkdirError(
      f"{path!r} cannot hold checkpoints: its path has a '[', a '\\' or"
      f" a 'gs:', or is not UTF-8. Pass another one with {flag}."
    )


def check_same(
  workdir: pathlib.Path,
  config: ConfigDict,
  *,
  free: Sequence[str] = (),
  mirror: str = "",
) -> None:
  """Checks that a run's stored configuration equals `config`.

  Keys in `free` and in `run.config.MAY_DIFFER` may differ. `num_epochs` may
  grow if the rates so far do not depend on it. If `workdir` is a temporary
  copy, errors name the `mirror` that it comes from.
  """
  stored = keys.to_flat(load_config(workdir))
  # Through JSON, which turns tuples into lists.
  current = json.loads(json.dumps(keys.to_flat(config)))
  for key in (*config_lib.MAY_DIFFER, *free):
    current[key] = stored.get(key)
  if current["num_epochs"] > stored["num_epochs"]:
    epochs_done = len(metrics.MetricsLog(workdir).read())
    if epochs_done < schedules.open_epochs(stored):
      current["num_epochs"] = stored["num_epochs"]
  if differing := errors.differences(stored, current):
    place, flag, advice = f"workdir {workdir}", "--workdir", ""
    if mirror:
      place, flag = f"checkpoint.mirror={mirror}", "checkpoint.mirror"
    elif not any(
      glob.glob(pattern, root_dir=workdir)
      for pattern in ("lock", "metrics.jsonl", "checkpoints/*")
    ):
      advice = " It has no checkpoint: delete it to start again."
    elif stored["num_epochs"] < current["num_epochs"]:
      advice = (
        " Its learning rates depend on num_epochs, so it cannot be lengthened"
        " (a run with schedule.name=constant can, and one with"
        " warmup_stable_decay until its rate falls);"
        f" --config.init_from={workdir} starts another run with its weights."
      )
    raise errors.WorkdirError(
      f"{place} holds a run of another configuration, which differs in"
      f" {', '.join(differing)}. Pass another {flag}, or the same configuration"
      f" to resume that run.{advice}"
    )


@contextlib.contextmanager
def exclusive(workdir: pathlib.Path) -> Iterator[None]:
  """Holds `workdir`/lock, which names its owner, and removes it at the end.

  The operating system frees a lock however its process ends, so the file that
  a killed process leaves is taken over.
  """
  path = workdir / "lock"
  # A soft lock would outlive a process that is killed.
  lock = filelock.FileLock(path, timeout=_PATIENCE, fallback_to_soft=False)
  try:
    with contextlib.suppress(FileNotFoundError):
      files.open_regular(path).close()
    held = lock.acquire()
  except filelock.Timeout:
    raise errors.WorkdirError(
      f"workdir {workdir} is in use by {_owner(path)}. Wait for it or stop it,"
      " or pass another --workdir."
    ) from None
  except OSError as error:
    # On a file system without locks the error names no file.
    if error.errno not in _NO_LOCKS or error.filename is not None:
      raise errors.WorkdirError(
        f"{path} cannot be locked: {error.strerror or error}. It must be a file"
        " that can be written; or pass another --workdir."
      ) from error
    _logger.warning(
      "warning: %s cannot be locked (%s): make sure that no other run uses it",
      path,
      error.strerror,
    )
    yield
    return
  with held:
    if path.stat().st_size:
      _logger.info("taking over the lock of %s, which has ended", _owner(path))
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    _WRITTEN[path] = json.dumps(owner).encode()
    path.write_bytes(_WRITTEN[path])
    try:
      yield
    finally:
      # Removed while locked, so that a waiting process notices the removal.
      with contextlib.suppress(OSError):
        if not is_taken(workdir):
          path.unlink()


# The content that this process has written into each of its locks.
_WRITTEN: dict[pathlib.Path, bytes] = {}


def is_taken(workdir: pathlib.Path) -> bool:
  """Whether another process uses, or may have used, a locked workdir."""
  path = workdir / "lock"
  try:
    # A new lock is empty until its owner has written into it.
    return files.read_bytes(path) not in (_WRITTEN[path], b"")
  except FileNotFoundError:
    # Another run has taken over and ended, or the lock was deleted: these look
    # alike. In a workdir that was removed, there is no config.json.
    return path in _WRITTEN and os.path.exists(workdir / "config.json")
  except (OSError, ValueError, KeyError):  # The file system may have no locks.
    return False


def _owner(path: pathlib.Path) -> str:
  try:
    owner = files.parse_object(files.read_bytes(path))
    return "process {pid} on {host} since {since}".format(**owner)
  except (OSError, ValueError, LookupError):  # Empty, or being written.
    return "another process"


# ---- The folder's files


def load_config(workdir: pathlib.Path) -> ConfigDict:
  """A workdir's stored configuration, locked; keys it lacks get defaults."""
  path = workdir / "config.json"
  try:
    stored = files.parse_object(files.read_bytes(path))
    if type(stored.get("seed")) is not int:  # Every version has this key.
      raise ValueError("it is no configuration: seed must be an integer")
    # JSON turns tuples into lists.
    defaults = json.dumps(config_lib.default_config().to_dict())
    config = ConfigDict(json.loads(defaults))
    with config.ignore_type():
      config.update(stored)
    flat = keys.to_flat(config)
    for name in _READ_UNCHECKED:
      if not config_lib.KEYS[name].values.accept(flat.get(name)):
        must = config_lib.KEYS[name].values.requirement
        raise ValueError(f"{name}={flat.get(name)!r:.100} must be {must}")
    return config.lock()
  except (FileNotFoundError, NotADirectoryError):
    raise errors.WorkdirError(
      f"{path} does not exist: {workdir} is not the workdir of a run. Pass the"
      " --workdir of a training run."
    ) from None
  except (
    *(OSError, ValueError, TypeError, AttributeError, RecursionError),
  ) as error:
    raise errors.WorkdirError(
      f"{path} cannot be read: {error}. Restore it, or start again in another"
      " --workdir."
    ) from error


def record_start(
  workdir: pathlib.Path,
  config: ConfigDict,
  devices: Sequence[jax.Device],
  data: str,
  facts: dict[str, Any],
) -> None:
  """Writes config.json and environment.json; warns if the environment changed.

  environment.json describes the first start; differences of later starts are
  added under 'resumed'. `data` is `Dataset.source`. `facts` about the data set
  are stored for uses of the run without its data; see `read_facts`.
  """
  # Each file by itself: a run may be killed between the two.
  if not (workdir / "config.json").exists():
    files.write_json(workdir / "config.json", config.to_dict())
  elif (first := load_config(workdir)).num_epochs != config.num_epochs:
    # The run is lengthened.
    lengthened = first.to_dict() | {"num_epochs": config.num_epochs}
    files.write_json(workdir / "config.json", lengthened)
  path = workdir / "environment.json"
  current = environment.describe(devices) | {"data": data}
  if not path.exists():
    files.write_json(path, current | {"dataset": facts})
    return
  check_data(workdir, data)
  stored = read_environment(workdir)
  if "converted" in stored and stored.get("data") is None:
    stored["data"] = data  # The weights were converted without data.
  stored.setdefault("dataset", facts)  # Converted and older runs lack it.
  added_keys = ("converted", "resumed", "dataset")
  first_start = {key: stored[key] for key in stored if key not in added_keys}
  if changes := errors.differences(first_start, current, "{}: {} -> {}"):
    _logger.warning(
      "warning: this run was started in another environment, so its numbers"
      " may differ: %s",
      "; ".join(changes),
    )
    resumed = stored.setdefault("resumed", [])
    if changes not in resumed[-1:]:
      resumed.append(changes)
  files.write_json(path, stored)


def read_environment(workdir: pathlib.Path) -> dict[str, Any]:
  """The content of environment.json; {} if the file is missing."""
  path = workdir / "environment.json"
  try:
    return files.parse_object(files.read_bytes(path))
  except (FileNotFoundError, NotADirectoryError):
    return {}
  except (OSError, ValueError) as error:
    raise errors.WorkdirError(
      f"{path} cannot be read: {error}. Restore or delete it: the run resumes"
      " without it, but its training data is then unknown."
    ) from error


def read_facts(workdir: pathlib.Path) -> types.Facts | None:
  """The facts about a run's data set; None if they are not stored."""
  facts: Any = read_environment(workdir).get("dataset")
  try:
    counts = int(facts["train"]), int(facts["test"])
    return types.Facts(tuple(map(str, facts["class_names"])), *counts)
  # An older version wrote the file, or it was edited.
  except (TypeError, ValueError, LookupError):
    return None


def check_data(workdir: pathlib.Path, data: str, known: str = "") -> None:
  """Checks that a run was trained on `data`, a `Dataset.source`.

  `known`, if given, replaces the entry of environment.json. Warns if the run's
  data is unknown.
  """
  stored = read_environment(workdir)
  trained_on = known or stored.get("data")
  if trained_on is None and "converted" not in stored:
    _logger.warning(
      "warning: %s does not name the run's training data; here it is %s",
      *(workdir / "environment.json", data),
    )
  elif trained_on not in (None, data):
    raise errors.WorkdirError(
      f"workdir {workdir} holds a run on other data: {trained_on!s:.200} there,"
      f" {data} here. Set dataset.data_dir (or TFDS_DATA_DIR) to the data of"
      " that run, or pass another --workdir."
    )


@contextlib.contextmanager
def explain_write_errors(
  workdir: pathlib.Path, *, running: bool = False
) -> Iterator[None]:
  """Turns OSError into `WorkdirError`; while `running`, checks for removal."""
  try:
    yield
  except OSError as error:
    reason = " ".join(str(error).split())
    # TensorStore's error for a full disk has no error number.
    if error.errno == errno.ENOSPC or "RESOURCE_EXHAUSTED" in reason:
      reason = "no space left on the disk"
    elif running:
      check_not_removed(workdir)
    # Not pathlib's glob, which raises an error if the disk is missing.
    if glob.glob("checkpoints/*/manifest.json", root_dir=workdir):
      hint = "The checkpoints that it holds are good; the same command resumes"
      hint += " from them"
    elif os.path.isdir(workdir):
      hint = "Nothing is saved; the same command starts again"
    else:
      hint = "It cannot be read either; once it is back, the command resumes"
    raise errors.WorkdirError(
      f"workdir {workdir} can no longer be written: {reason[:300]}. {hint}."
    ) from error


def check_not_removed(workdir: pathlib.Path) -> None:
  """Checks that the run's folder was not removed, emptied or taken over.

  Orbax would make a new folder in its place, without the run's other files.
  """
  if is_taken(workdir):
    raise errors.WorkdirError(
      f"workdir {workdir}, or its lock, was removed; it may now belong to"
      f" {_owner(workdir / 'lock')}. This run ends and saves nothing more."
    )
  try:
    os.stat(workdir / "config.json")
  except (FileNotFoundError, NotADirectoryError):
    raise errors.WorkdirError(
      f"workdir {workdir} was removed or emptied while the run trained. The"
      " same command resumes from what is left there, or starts again."
    ) from None
  except OSError:  # The disk is missing; the next write reports it.
    pass
