"""Decoded images on disk, memory-mapped, so that a second start is fast.

An entry is a folder of .npy files and `index.json`, which is written last and
holds their digests. Entries are built beside their final name and renamed, so
a half-written entry is never found. An entry that fails its check is rebuilt.
"""

import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Callable

import numpy as np
import platformdirs

from resnet_flax.data import types
from resnet_flax.run import errors, files

_logger = logging.getLogger(__name__)

_FORMAT = 2
_ABANDONED = 24 * 3600.0  # Seconds after which no writer can be at work.
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def cache_dir(configured: str) -> pathlib.Path:
  """The folder for cached data: the configured one, else the user's own."""
  own = platformdirs.user_cache_dir("resnet_flax")
  return errors.resolve(configured or own)


def cached(
  folder: pathlib.Path, key: str, build: Callable[[], types.Arrays]
) -> types.Arrays:
  """The arrays of entry `key`, memory-mapped; builds a missing entry."""
  entry = folder / key
  if (arrays := _open(entry)) is not None:
    return arrays
  try:
    folder.mkdir(parents=True, exist_ok=True)
    # A folder that cannot be written must fail before the slow build.
    with files.temporary_folder(folder, f".{key}-", _ABANDONED) as temporary:
      arrays = build()
      _store(entry, temporary, arrays)
  except OSError as error:
    raise errors.DataError(
      f"decoded images cannot be cached in {folder}: {error}. Set"
      " --config.dataset.cache_dir to a directory with space."
    ) from error
  return _open(entry) or arrays


def _open(entry: pathlib.Path) -> types.Arrays | None:
  """Returns an entry's arrays; None if it is missing or a byte has changed."""
  try:
    index = json.loads(files.read_text(entry / "index.json"))
    if index["format"] != _FORMAT:
      return None
    names = index["class_names"]
    if index["sha256"] != _digests(entry, names):
      raise ValueError("its SHA-256 has changed")
    arrays = {
      # Unlike `np.load`, this opens only .npy files, and none with objects.
      name: np.lib.format.open_memmap(entry / f"{name}.npy", mode="r")
      for name in _ARRAYS
    }
    return types.Arrays(**arrays, class_names=tuple(names))
  except FileNotFoundError:
    return None
  # An entry with any other fault is built again.
  except Exception as error:
    _logger.warning(
      "%s is damaged (%s) and not used", entry, errors.one_line(error)
    )
    return None


def _store(
  entry: pathlib.Path, temporary: pathlib.Path, arrays: types.Arrays
) -> None:
  made = temporary / "made"
  made.mkdir(0o700)
  for name in _ARRAYS:
    np.save(made / f"{name}.npy", getattr(arrays, name))
  names = list(arrays.class_names)
  digests = _digests(made, names)
  index = {"format": _FORMAT, "class_names": names, "sha256": digests}
  (made / "index.json").write_text(json.dumps(index, indent=2))
  # Another process may have stored this entry meanwhile and may be reading it,
  # so only a damaged entry is replaced.
  if os.path.lexists(entry) and _open(entry) is None:
    os.replace(entry, made.with_name("damaged"))
  if not os.path.lexists(entry):
    os.replace(made, entry)


def _digests(entry: pathlib.Path, class_names: list[str]) -> dict[str, str]:
  """The SHA-256 of each array's file, and of the class names."""
  text = json.dumps(class_names).encode()
  digests = {"class_names": hashlib.sha256(text).hexdigest()}
  return digests | {
    name: files.digest_of(entry / f"{name}.npy") for name in _ARRAYS
  }
