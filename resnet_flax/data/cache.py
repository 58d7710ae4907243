"""Decoded images on disk, memory-mapped, so that a second start is fast.

An entry is a folder of .npy files and `SHA256SUMS`, which is written last.
Entries are built beside their final name and renamed, so a half-written entry
is never found. An entry that fails its check is rebuilt.
"""

import contextlib
import logging
import os
import pathlib
from collections.abc import Callable

import numpy as np
import platformdirs

from resnet_flax.data import types
from resnet_flax.run import errors, files

_logger = logging.getLogger(__name__)

_ABANDONED = 24 * 3600.0  # Seconds after which no writer can be at work.
_SUMS = "SHA256SUMS"


def cache_dir(configured: str) -> pathlib.Path:
  """The folder for cached data: the configured one, else the user's own."""
  user_dir = platformdirs.user_cache_dir("resnet_flax")
  return errors.resolve(configured or user_dir, "dataset.cache_dir")


def cached(
  folder: pathlib.Path, key: str, build: Callable[[], types.Arrays]
) -> types.Arrays:
  """Entry `key`'s arrays, memory-mapped; builds a missing or damaged entry."""
  entry = folder / key
  if arrays := _open(entry):
    return arrays
  try:
    folder.mkdir(parents=True, exist_ok=True)
    # A folder that cannot be written must fail before the slow build.
    with files.temporary_folder(folder, f".{key}-", _ABANDONED) as temporary:
      arrays, new_entry = build(), temporary / "made"
      new_entry.mkdir(0o700)
      for name, array in arrays.items():
        np.save(new_entry / f"{name}.npy", array)
      (new_entry / _SUMS).write_text(_sums(new_entry))
      # Another process may have stored this entry meanwhile and may be reading
      # it, so only a damaged entry is replaced.
      if os.path.lexists(entry) and not _open(entry):
        with contextlib.suppress(FileNotFoundError):  # Another moved it first.
          os.replace(entry, temporary / "damaged")
      if not os.path.lexists(entry):
        try:
          os.replace(new_entry, entry)
        except OSError:
          if not _open(entry):  # Else another process was faster.
            raise
  except OSError as error:
    raise errors.DataError(
      f"decoded images cannot be cached in {folder}: {error}. Set"
      " --config.dataset.cache_dir to a writable directory with free space."
    ) from error
  return _open(entry) or arrays


def _open(entry: pathlib.Path) -> types.Arrays:
  """An entry's arrays; empty if the entry is missing or damaged."""
  try:
    if files.read_text(entry / _SUMS) != _sums(entry):
      raise ValueError("its SHA-256 has changed")
    return {
      # Unlike `np.load`, this opens only .npy files, and none with objects.
      path.stem: np.lib.format.open_memmap(path, mode="r")
      for path in entry.glob("*.npy")
    }
  except FileNotFoundError:
    return {}
  # An entry with any other fault is built again.
  except Exception as error:
    _logger.warning(
      "%s is damaged (%s) and not used", entry, errors.one_line(error)
    )
    return {}


def _sums(entry: pathlib.Path) -> str:
  """The SHA-256 of each array's file, as `sha256sum` prints it."""
  paths = sorted(entry.glob("*.npy"))
  return "".join(f"{files.digest_of(path)}  {path.name}\n" for path in paths)
