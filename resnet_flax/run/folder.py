"""The folder of one run: its configuration, its environment, its name."""

import contextlib
import errno
import hashlib
import json
import logging
import pathlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from resnet_flax.run import (
  config as config_rules,
  environment,
  errors,
  lock,
  whole_file,
)

_logger = logging.getLogger(__name__)

_MAX_NAME = 120


def default_name(config_path: str, overrides: dict[str, Any]) -> str:
  """A folder name that differs between configs and overrides.

  Args:
    config_path: path of the config file, for example configs/v1_depth20.py.
    overrides: flat overrides, for example {'model.depth': 56}.

  Returns:
    For example 'v1_depth20' or 'v1_depth20,model.depth=56'.
  """
  parts = [pathlib.Path(config_path.partition(":")[0]).stem]
  parts += [f"{key}={value}" for key, value in sorted(overrides.items())]
  name = ",".join(parts)
  readable = re.sub(r"[^\w.,=+-]", "_", name)
  if readable == name and len(name) <= _MAX_NAME:
    return name
  # Characters were lost or the name is too long: a digest tells them apart.
  digest = hashlib.sha256(name.encode()).hexdigest()[:8]
  return f"{readable[:_MAX_NAME]},{digest}"


def load_config(workdir: pathlib.Path) -> ConfigDict:
  """The configuration stored in a workdir, locked.

  Keys that the version which stored it did not know are filled in.

  Raises:
    WorkdirError: there is none, or it cannot be read.
  """
  path = workdir / "config.json"
  try:
    stored = json.loads(path.read_text())
    if not isinstance(stored, dict):
      raise ValueError("it holds no JSON object")
    return ConfigDict(config_rules.with_defaults(stored)).lock()
  except FileNotFoundError:
    raise errors.WorkdirError(
      f"{path} does not exist: {workdir} is not the workdir of a run. Pass the"
      " --workdir that was trained in."
    ) from None
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise errors.WorkdirError(
      f"{path} cannot be read: {error}. Restore it, or start again in another"
      " --workdir."
    ) from error


@contextlib.contextmanager
def use(workdir: pathlib.Path, config: ConfigDict) -> Iterator[None]:
  """Makes the workdir, checks that this run may use it, and locks it.

  A folder that was made here is removed again if nothing was put into it.

  Raises:
    WorkdirError: see `check`; or another process uses it.
  """
  try:
    made = not workdir.exists()
  except OSError as error:  # A name that is too long, for example.
    raise _cannot_be_written(workdir, error) from error
  check(workdir, config)
  try:
    with lock.exclusive(workdir):
      yield
  finally:
    if made:
      with contextlib.suppress(OSError):
        workdir.rmdir()


def check(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Makes the workdir and checks that this experiment may use it.

  Raises:
    WorkdirError: it cannot be written, or it holds a run whose configuration
      differs in a key that changes the mathematics.
  """
  check_name(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as error:
    raise _cannot_be_written(workdir, error) from error
  if (workdir / "config.json").exists():
    check_same(workdir, config)


def check_name(workdir: pathlib.Path) -> None:
  """Checks that checkpoints in this folder can be read again.

  Raises:
    WorkdirError: Orbax takes a part of its path for a pattern and would leave
      out files, or cannot write it down.
  """
  path = str(workdir.absolute())
  try:
    path.encode()
  except UnicodeEncodeError:
    reason = "is not UTF-8"
  else:
    if "[" not in path:
      return
    reason = "has a '['"
  raise errors.WorkdirError(
    f"workdir {path!r} cannot hold checkpoints: its path {reason}. Pass"
    " another one with --workdir."
  )


def _cannot_be_written(
  workdir: pathlib.Path, error: OSError
) -> errors.WorkdirError:
  return errors.WorkdirError(
    f"workdir {workdir} cannot be written: {error.strerror}. Pass another"
    " one with --workdir."
  )


def check_same(
  workdir: pathlib.Path, config: ConfigDict, *, free: Sequence[str] = ()
) -> None:
  """Checks that a run's stored configuration is this one.

  Keys that do not change the mathematics may differ.

  Args:
    workdir: the run's folder.
    config: the given configuration.
    free: other keys that may differ.

  Raises:
    WorkdirError: there is no run, or it is another; lists the differing keys.
  """
  stored = config_rules.flatten(load_config(workdir).to_dict())
  # Through JSON, in which tuples are lists.
  given = config_rules.flatten(json.loads(json.dumps(config.to_dict())))
  differing = [
    f"{key} ({stored.get(key)!r} there, {given.get(key)!r} here)"
    for key in sorted(stored.keys() | given.keys())
    if stored.get(key) != given.get(key)
    and key not in (*config_rules.MAY_DIFFER, *free)
  ]
  if differing:
    raise errors.WorkdirError(
      f"workdir {workdir} holds a run of another configuration, which differs"
      f" in {', '.join(differing)}. Pass another --workdir, or the same"
      " configuration to go on with that run."
    )


def record_start(
  workdir: pathlib.Path,
  config: ConfigDict,
  devices: list[jax.Device],
  data: str,
) -> None:
  """Writes config.json and environment.json; warns if the latter changed.

  environment.json is that of the first start. Where the run goes on in
  another one, the differences are added under 'resumed'.

  Args:
    workdir: the run's folder.
    config: every key of `configs/base.py`.
    devices: those that the run uses.
    data: `Dataset.source`.

  Raises:
    WorkdirError: the run was started on other pixels, or environment.json
      cannot be read.
  """
  # Each by itself: a run may be killed between the two.
  if not (workdir / "config.json").exists():
    write_json(workdir / "config.json", config.to_dict())
  path = workdir / "environment.json"
  now = environment.describe(devices) | {"data": data}
  if not path.exists():
    write_json(path, now)
    return
  try:
    stored = json.loads(path.read_text())
    resumed = stored.pop("resumed", [])
    # What the first state was made from is no part of the environment.
    converted = {k: stored.pop(k) for k in ["converted"] if k in stored}
  except (OSError, ValueError, AttributeError, TypeError) as error:
    raise errors.WorkdirError(
      f"{path} cannot be read: {error}. Delete it to go on with the run: it is"
      " written anew."
    ) from error
  if converted and stored.get("data") is None:
    # Its weights needed no data; from here on the run does.
    stored["data"] = data
    write_json(path, stored | converted | {"resumed": resumed})
  if stored.get("data") != data:
    raise errors.WorkdirError(
      f"workdir {workdir} holds a run on other data: {stored.get('data')}"
      f" there, {data} here. Pass the dataset.data_dir it was started with, or"
      " another"
      " --workdir."
    )
  changes = environment.changes(stored, now)
  if changes:
    _logger.warning(
      "warning: this run was started in another environment, so its numbers"
      " may differ in the last bits: %s",
      "; ".join(changes),
    )
    if not resumed or resumed[-1] != changes:
      resumed = [*resumed, changes]
      write_json(path, stored | converted | {"resumed": resumed})


@contextlib.contextmanager
def explain_write_errors(
  workdir: pathlib.Path, *, running: bool = False
) -> Iterator[None]:
  """A full disk or a lost workdir ends in one line, not in a traceback.

  Args:
    workdir: the run's folder.
    running: `record_start` was called: if its files are gone now, whatever
      fails does so for that.
  """
  try:
    yield
  except OSError as error:
    text = " ".join(str(error).split())
    # TensorStore has words of its own for a full disk.
    if error.errno == errno.ENOSPC or "RESOURCE_EXHAUSTED" in text:
      text = "no space left on the disk"
    elif running and _is_removed(workdir):
      raise _removed(workdir) from error
    raise errors.WorkdirError(
      f"workdir {workdir} can no longer be written: {text[:300]}. The"
      " checkpoints that it holds are good; the same command goes on from"
      " them."
    ) from error


def check_not_removed(workdir: pathlib.Path) -> None:
  """Checks that the folder of a run that goes on is still there.

  Orbax would make another in its place, without the files that go with it.

  Raises:
    WorkdirError: it is not, or not with what the run has put there.
  """
  if _is_removed(workdir):
    raise _removed(workdir)


def _is_removed(workdir: pathlib.Path) -> bool:
  return not (workdir / "config.json").exists()


def _removed(workdir: pathlib.Path) -> errors.WorkdirError:
  return errors.WorkdirError(
    f"workdir {workdir} was removed or emptied while the run went on. The same"
    " command goes on from what is left there, or starts anew."
  )


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file whole or not at all."""
  text = json.dumps(value, indent=2) + "\n"
  whole_file.write(path, text.encode())
