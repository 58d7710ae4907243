"""Checkpoints through Orbax: their content, and which of them are kept.

A checkpoint is a train state and `manifest.json`: each array's dtype and shape,
numbers of the epoch in progress, and the SHA-256 of each file of the state.
Orbax would restore flipped bits silently, so the files are checked first.

Orbax gets one vector for each dtype: the arrays, joined in the manifest's
order. TensorStore needs a millisecond for each array that it gets, and some
memory that it never frees.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from resnet_flax import step as step_lib
from resnet_flax.run import errors, files as files_lib

_logger = logging.getLogger(__name__)

# JSON about the epoch in progress, saved with a state.
Notes = dict[str, Any]
# At the start of an epoch: each seed's learning rate at the last step, the
# epoch's seconds so far, and the seconds that training waited for data.
NEW_EPOCH: Notes = {
  "learning_rate": [],
  "epoch_seconds": 0.0,
  "data_seconds": 0.0,
}

# Orbax writes a state twice, since it merges its files at the end. The space is
# checked first, since on a full disk its threads fail in many noisy ways.
SPACE_FACTOR = 3

_FORMAT = 3
_MANIFEST = "manifest.json"
_STATE = "state"  # Orbax's folder.
_MERGED = "manifest.ocdbt"  # Orbax writes this file last and reads it first.

# Names for the parts of a state in errors; metrics, `epoch_sums`, may differ.
# Parameters come first: where they differ, the optimizer's state does, too.
_PARTS = {
  "params": "network",
  "batch_stats": "network",
  "step": "network",
  "opt_state": "optimizer",
  "rate_state": "schedule",
  "normalization": "normalization",
  "average": "average of the weights",
}


class _Damaged(errors.WorkdirError):
  def __init__(self, path: pathlib.Path, what: str):
    super().__init__(f"checkpoint {path} is damaged: {what}")


class Checkpoints:
  """The checkpoints of one workdir: the latest two and the best epochs'.

  A context manager; leaving it waits for the save in progress. `best_steps`
  returns the steps of the best epochs so far. `on_event` is called in Orbax's
  thread, with "manifest" before each manifest is written. `is_taken` says
  whether another run has taken over the workdir.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    best_steps: Callable[[], Collection[int]] = tuple,
    on_event: Callable[[str], None] = lambda name: None,
    is_taken: Callable[[], bool] = lambda: False,
  ):
    self._workdir, self._best_steps = workdir, best_steps
    self._is_taken = is_taken
    self._folder = (workdir / "checkpoints").absolute()
    self._damaged = workdir / "damaged"
    self._on_event = on_event
    self._manifest: dict[str, Any] = {}
    self._folder.mkdir(parents=True, exist_ok=True)
    # A killed run's half-written checkpoint is useless. Orbax would remove it
    # in a thread, which would outlive a run that fails at once.
    for unfinished in ocp.utils.tmp_checkpoints(self._folder):
      shutil.rmtree(unfinished.get(), ignore_errors=True)
    options = ocp.CompositeOptions(multiprocessing_options=_alone())
    self._saver = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(_STATE, composite_options=options),
      # A checkpoint must have its manifest before it has its final name.
      async_options=ocp.AsyncOptions(
        post_finalization_callback=self._write_manifest
      ),
      multiprocessing_options=_alone(),
    )

  def __enter__(self) -> "Checkpoints":
    self._hooks = sys.unraisablehook, sys.excepthook
    sys.unraisablehook, sys.excepthook = (
      errors.quiet(hook, _is_noise) for hook in self._hooks
    )
    return self

  def __exit__(self, kind: Any, *exception: object) -> None:
    # Closing raises again an error that is already being reported.
    already_reported = (OSError,) if kind else ()
    try:
      with contextlib.suppress(*already_reported), only_os_errors():
        self._saver.close()
    finally:
      sys.unraisablehook, sys.excepthook = self._hooks
    with contextlib.suppress(OSError):  # The disk may be missing.
      # After an error the best steps may be unknown, or the best step's save
      # may have failed: then the older checkpoints stay.
      if not self._is_taken() and (
        not kind or self._manifest.get("step") in steps(self._workdir)
      ):
        self._remove_old()
      # A run that failed before its first checkpoint leaves no folder.
      self._folder.rmdir()

  def save(self, state: step_lib.TrainState, notes: Notes) -> None:
    """Starts to save the state of all seeds, which may be donated afterwards.

    Raises `WorkdirError` if the disk has no room for it, and `OSError` if this
    checkpoint or the one before it could not be written.
    """
    # Orbax's thread may still be writing the last checkpoint's manifest.
    self.wait()
    self._remove_old()
    needed = SPACE_FACTOR * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(self._folder).free
    if free < needed:
      raise errors.WorkdirError(
        f"no space left for a checkpoint in {self._folder}: it needs"
        f" {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free. The checkpoints"
        " there are good: free some space, and the same command resumes."
      )
    vectors: dict[str, list[np.ndarray]] = {}
    for leaf in jax.tree.leaves(jax.device_get(state)):
      vectors.setdefault(str(leaf.dtype), []).append(np.ravel(leaf))
    packed = {dtype: np.concatenate(each) for dtype, each in vectors.items()}
    step = int(np.ravel(state.step)[0])
    self._manifest = {"format": _FORMAT, "step": step, "notes": notes}
    self._manifest["arrays"] = _forms(state)
    arguments = ocp.args.Composite(**{_STATE: ocp.args.StandardSave(packed)})
    with only_os_errors():
      self._saver.save(self._folder / str(step), args=arguments)

  def wait(self) -> None:
    """Waits until all is on disk; raises OSError if writing failed."""
    with only_os_errors():
      self._saver.wait_until_finished()

  def _remove_old(self) -> None:
    """Removes all but the latest two checkpoints and the best ones."""
    saved_steps = steps(self._workdir)
    for step in {*saved_steps[:-2]} - {*self._best_steps()}:
      shutil.rmtree(self._folder / str(step), ignore_errors=True)

  def restore_latest(
    self, like: step_lib.TrainState
  ) -> tuple[step_lib.TrainState, Notes]:
    """Restores the latest good checkpoint; `WorkdirError` if there is none.

    Later checkpoints, all damaged, move to `workdir`/damaged, with a warning.
    """
    damaged: dict[int, _Damaged] = {}
    for step in reversed(steps(self._workdir)):
      try:
        restored = restore(self._workdir, step, like)
      except _Damaged as error:
        damaged[step] = error
        continue
      for bad_step, reason in damaged.items():
        _logger.warning("warning: %s", reason)
        self._damaged.mkdir(exist_ok=True)
        target, count = self._damaged / str(bad_step), 1
        while target.exists():
          target, count = self._damaged / f"{bad_step}-{count}", count + 1
        (self._folder / str(bad_step)).rename(target)
      if damaged:
        _logger.warning(
          "warning: going back to the checkpoint of step %d; damaged ones are"
          " now in %s",
          step,
          self._damaged,
        )
      return restored
    reasons = "; ".join(map(str, damaged.values()))
    raise errors.WorkdirError(
      f"no checkpoint in {self._folder} is good: {reasons}. Nothing was"
      " changed. Restore one of these folders, or start again in another"
      " --workdir."
    )

  def has_fallen_back(self, step: int) -> bool:
    """Whether a later checkpoint was damaged and moved to damaged/."""
    names = [path.name.partition("-")[0] for path in self._damaged.glob("*")]
    return any(int(name) > step for name in names if name.isdecimal())

  def _write_manifest(self) -> None:
    self._on_event("manifest")
    # Orbax calls this in its thread, before it gives the folder its final name.
    unfinished = ocp.utils.tmp_checkpoints(self._folder)
    if len(unfinished) != 1:
      raise FileNotFoundError(f"{self._folder} was changed by another process")
    folder = pathlib.Path(unfinished[0].get())
    if not (folder / _STATE / _MERGED).is_file():
      raise FileNotFoundError(f"{folder / _STATE / _MERGED} was not written")
    paths = _state_files(folder)
    digests = {name: files_lib.digest_of(path) for name, path in paths.items()}
    manifest = self._manifest | {"files": digests}
    manifest["sha256"] = _seal(manifest)
    files_lib.write_json(folder / _MANIFEST, manifest)


def _alone() -> ocp.options.MultiprocessingOptions:
  """Options for one process with the whole state: Orbax waits for no other."""
  process = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=process, active_processes={process}
  )


def _is_noise(error: BaseException | None) -> bool:
  # When a save fails, Orbax raises the first error and closes its event loop.
  # The threads of TensorStore then report more errors to the closed loop.
  return str(error) == "Event loop is closed"


@contextlib.contextmanager
def only_os_errors() -> Iterator[None]:
  """Turns the many exceptions of Orbax and TensorStore into OSError."""
  try:
    yield
  except OSError:
    raise
  except Exception as error:
    raise OSError(str(error)) from error


# ---- Reading


def steps(workdir: pathlib.Path) -> list[int]:
  """The steps of a workdir's complete checkpoints, ascending."""
  try:
    names = os.listdir(workdir / "checkpoints")
  except FileNotFoundError:
    return []
  return sorted(int(name) for name in names if name.isdecimal())


def restore(
  workdir: pathlib.Path, step: int, like: step_lib.TrainState
) -> tuple[step_lib.TrainState, Notes]:
  """Checks a checkpoint; returns its state, as NumPy arrays, and its notes.

  `like` has the shapes and dtypes. Metrics in `epoch_sums` that the checkpoint
  lacks are NaN. `WorkdirError` if it is damaged or its other arrays differ.
  """
  path = workdir.absolute() / "checkpoints" / str(step)
  manifest = _checked_manifest(path)
  saved, expected = manifest["arrays"], _forms(like)
  _check_same_arrays(path, saved, expected)
  try:
    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as reader:
      vectors = reader.restore(path / _STATE)
    arrays = {}
    for name, form in saved.items():
      dtype, _, dimensions = form.partition("[")
      shape = json.loads(f"[{dimensions}")
      array, vectors[dtype] = np.split(vectors[dtype], [math.prod(shape)])
      arrays[name] = array.reshape(shape)
  except MemoryError:
    raise  # The checkpoint may be good.
  # Orbax and TensorStore raise a different exception for each kind of damage.
  except Exception as error:
    raise _Damaged(path, errors.one_line(error)) from error
  leaves, structure = jax.tree.flatten(like)
  leaves = [
    arrays[name]
    if saved.get(name) == form
    else np.full(leaf.shape, np.nan, leaf.dtype)  # A metric that is new.
    for (name, form), leaf in zip(expected.items(), leaves, strict=True)
  ]
  # Notes of older checkpoints lack `data_seconds`.
  return jax.tree.unflatten(structure, leaves), NEW_EPOCH | manifest["notes"]


def _checked_manifest(path: pathlib.Path) -> dict[str, Any]:
  """Reads a checkpoint's manifest and checks all files against it."""
  try:
    manifest = files_lib.parse_object(files_lib.read_bytes(path / _MANIFEST))
    if manifest.pop("sha256") != _seal(manifest):
      raise _Damaged(path, f"{_MANIFEST} has changed since it was written")
    # Older manifests do not name the step.
    if str(manifest.get("step", path.name)) != path.name:
      raise _Damaged(path, f"its step is {manifest['step']}; rename it back")
    if manifest["format"] != _FORMAT:
      raise errors.WorkdirError(
        f"checkpoint {path} has format {manifest['format']}; this version of"
        f" the program reads format {_FORMAT}. Use the version that saved it."
      )
    paths = _state_files(path)
    for name, digest in manifest["files"].items():
      if name not in paths:
        raise _Damaged(path, f"{name} is missing")
      if files_lib.digest_of(paths[name]) != digest:
        raise _Damaged(path, f"{name} has changed since it was written")
  except FileNotFoundError as error:
    raise _Damaged(path, f"{_MANIFEST} is missing") from error
  except (OSError, ValueError, KeyError) as error:
    raise _Damaged(path, errors.one_line(error)) from error
  return manifest


def file_digests(workdir: pathlib.Path, step: int) -> dict[str, str]:
  """The SHA-256 of a state's files, by name; `WorkdirError` if damaged."""
  return _checked_manifest(workdir / "checkpoints" / str(step))["files"]


def _state_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """The files of a checkpoint's state by their names in its manifest."""
  paths = sorted((folder / _STATE).rglob("*"))
  return {str(p.relative_to(folder)): p for p in paths if p.is_file()}


def _seal(manifest: dict[str, Any]) -> str:
  """The SHA-256 of a manifest, which is added to the manifest."""
  return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def named_arrays(state: step_lib.TrainState) -> dict[str, Any]:
  """The arrays of a state, or their shapes, by path: 'params/head/bias'."""
  flat, _ = jax.tree_util.tree_flatten_with_path(state)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in flat
  }


def _forms(state: step_lib.TrainState) -> dict[str, str]:
  """Dtype and shape of every array by path, such as 'float32[16, 10]'."""
  return {
    name: f"{leaf.dtype}{list(leaf.shape)}"
    for name, leaf in named_arrays(state).items()
  }


def _check_same_arrays(
  path: pathlib.Path, saved: dict[str, str], expected: dict[str, str]
) -> None:
  for part, what in _PARTS.items():
    for name in [*expected, *saved]:
      old, new = (forms.get(name, "missing") for forms in (saved, expected))
      if name.partition("/")[0] == part and new != old:
        raise errors.WorkdirError(
          f"checkpoint {path} holds another {what}: {name} is {old} there,"
          f" {new} here. Use the configuration and the version of the program"
          " that saved it, or pass another --workdir."
        )
