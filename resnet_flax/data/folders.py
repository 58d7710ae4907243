"""Folders of pictures: train/CLASS/*, perhaps with val/ and test/, or CLASS/*.

The test split is test/, else validation/, else val/, else every tenth picture
of a class by name, which is then not trained on. The validation split is val/,
else validation/, unless that is the test split.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from resnet_flax.data import types
from resnet_flax.run import errors, files

_logger = logging.getLogger(__name__)

# The formats that `pictures` decodes. Names may be in upper or lower case.
_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
_FORM = (
  "It must hold CLASS/PICTURE, or train/CLASS/PICTURE and perhaps the same in"
  " val/ or test/, for two classes or more. Without val/ and test/ a class must"
  " have two pictures. For a TFDS set pass --config.dataset.name=tfds/NAME."
)

# Paths of pictures by part and class. Classes and paths are sorted; the first
# part is the training split, the last part is the test split.
Parts = dict[str, dict[str, list[str]]]


@functools.lru_cache(1 << 14)  # A folder that has changed is read again.
def _scan(folder: str, mtime_ns: int) -> tuple[list[str], list[str], int]:
  """Names of folders, paths of pictures, and the number of other entries."""
  folders, pictures = [], []
  with os.scandir(folder) as entries:
    visible = [entry for entry in entries if not entry.name.startswith(".")]
  for entry in visible:  # Only links are looked up on the disk.
    with contextlib.suppress(OSError):  # Links may form a circle.
      if entry.is_dir():
        folders.append(entry.name)
      elif entry.name.lower().endswith(_EXTENSIONS) and entry.is_file():
        pictures.append(entry.path)
  return sorted(folders), sorted(pictures), len(visible) - len(pictures)


def _list(root: str) -> tuple[Parts, int, list[str]]:
  """The parts, the number of other entries in classes, and unused folders."""

  def scan(*names: str) -> tuple[list[str], list[str], int]:
    folder = os.path.join(root, *names)
    return _scan(folder, os.stat(folder).st_mtime_ns)

  parts: Parts = {}
  num_others = 0
  names, top_dirs, unused = [""], scan()[0], list[str]()
  # A folder train/ that holds only pictures is a class of that name.
  if "train" in top_dirs and scan("train")[0]:
    names = [n for n in ("train", "val", "validation", "test") if n in top_dirs]
    if len(names) > 3:
      names.remove("validation")  # There is val, too.
    unused = [name for name in top_dirs if name not in names]
  for name in names:
    scans = {each: scan(name, each) for each in scan(name)[0]}
    parts[name] = {each: pictures for each, (_, pictures, _) in scans.items()}
    num_others += sum(others for *_, others in scans.values())
  if len(parts) == 1:
    (classes,) = parts.values()
    parts = {"train": {}, "a tenth": {}}
    for each, pictures in classes.items():
      parts["train"][each] = [p for k, p in enumerate(pictures) if k % 10]
      parts["a tenth"][each] = pictures[::10]
  return parts, num_others, unused


def _check(parts: Parts) -> None:
  """Raises a ValueError unless all parts have pictures of the same classes."""
  classes = parts["train"].keys()
  if len(classes) < 2:
    raise ValueError(f"it must have two class folders, not {[*classes]}")
  for part, by_class in parts.items():
    for each in sorted(classes ^ by_class.keys()):
      raise ValueError(f"class {each!r} is in only one of train and {part}")
    for each, pictures in by_class.items():
      if not pictures:
        kinds = ", ".join(_EXTENSIONS)
        raise ValueError(f"class {each!r} has no picture ({kinds}) in {part}")


def find(config: ConfigDict) -> tuple[pathlib.Path, Parts, int, list[str]]:
  """`config.data_dir` and its `_list`; raises `ConfigError` or `DataError`."""
  if not config.data_dir:
    raise errors.ConfigError(
      "dataset.data_dir='' must name a folder of pictures for dataset.name="
      f"folder; TFDS_DATA_DIR is not used. {_FORM}"
    )
  root = errors.resolve(config.data_dir, "dataset.data_dir")
  try:
    parts, num_others, unused = _list(str(root))
    _check(parts)
  except (OSError, ValueError) as error:
    raise errors.DataError(
      f"dataset.data_dir={root} cannot be used: {error}. {_FORM}"
    ) from error
  return root, parts, num_others, unused


def facts(config: ConfigDict) -> types.Facts:
  """Class names, numbers of training and test pictures; `find`'s errors."""
  train, *_, scored = find(config)[1].values()
  num_train, num_test = (sum(map(len, p.values())) for p in (train, scored))
  return types.Facts(tuple(train), num_train, num_test)


@dataclasses.dataclass(frozen=True)
class Files:
  """The pictures of a part, with the interface of `prepared.Records`."""

  folder: pathlib.Path
  name: str
  paths: Sequence[str]
  labels: np.ndarray  # int32
  remedy = "Repair or remove such pictures. "

  def examples(self, rows: np.ndarray) -> list[Callable[[], tuple[bytes, int]]]:
    """See `prepared.Records`."""
    return [functools.partial(self._read, row) for row in rows]

  def _read(self, row: int) -> tuple[bytes, int]:
    return files.read_bytes(pathlib.Path(self.paths[row])), self.labels[row]

  def place(self, row: int) -> str:
    """The path of a picture below the folder, for messages."""
    return os.path.relpath(self.paths[row], self.folder)


def read(
  config: ConfigDict,
) -> tuple[list[tuple[Files, np.ndarray]], np.ndarray, tuple[str, ...], str]:
  """See `prepared.read`; there may be a validation split between the two."""
  root, parts, num_others, unused = find(config)
  sources = []
  for part, by_class in parts.items():
    classes = np.arange(len(by_class), dtype=np.int32)
    labels = np.repeat(classes, [*map(len, by_class.values())])
    paths = [path for each in by_class.values() for path in each]
    sources.append(Files(root, part, paths, labels))
  counts = ", ".join(f"{each.name} {len(each.paths)}" for each in sources)
  message = "pictures in %s: %s; %d other entries are ignored"
  _logger.info(message, root, counts, num_others)
  if unused:
    message = "warning: these folders in %s are not used: %s"
    _logger.warning(message, root, f"{', '.join(unused):.500}")
  paths = [path for each in sources for path in each.paths]
  sizes = [os.stat(path).st_size for path in paths]
  is_small = sum(sizes) <= files.READ_WHOLE
  # Names contain the class folders, so the digest covers the labels, too.
  digest = hashlib.sha256()
  for path, size in zip(paths, sizes, strict=True):
    name = os.fsencode(os.path.relpath(path, root))
    digest.update(b"%b\0%d\0" % (name, size))
    if is_small:
      # A picture that cannot be read is reported as bad when it is decoded.
      with contextlib.suppress(OSError):
        digest.update(bytes.fromhex(files.digest_of(pathlib.Path(path))))
  rows = [(each, np.arange(len(each.paths))) for each in sources]
  source = f"folder-{digest.hexdigest()[:16]}"
  return rows, sources[0].labels, tuple(parts["train"]), source
