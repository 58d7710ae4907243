"""Reads copies of data sets that TFDS has prepared, and does not trust them."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import resource
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from resnet_flax.data import types
from resnet_flax.run import errors, files

FILE_FORMAT = "array_record"
# Prefix of `dataset.name` for TFDS sets with the features image and label.
PREFIX = "tfds/"
SET_DATA_DIR = "Set --config.dataset.data_dir (or TFDS_DATA_DIR) to"
DELETE = "Delete it to have it prepared again."
PREPARE_AGAIN = "Prepare it again, or take another copy."
_SAMPLE = 1 << 14  # Bytes of each sample that a fingerprint reads from a file.


def data_dir(configured: str) -> pathlib.Path:
  """The `configured` folder or $TFDS_DATA_DIR (must exist), else TFDS's own."""
  name = "dataset.data_dir" if configured else "TFDS_DATA_DIR"
  chosen = configured or os.environ.get(name, "")
  path = errors.resolve(chosen or "~/tensorflow_datasets", name)
  if chosen and not os.path.isdir(path):
    raise errors.DataError(
      f"{name}={path} is not a directory. Pass the one that holds the data, or"
      " make an empty one to have the data prepared there."
    )
  return path


def find(
  name: str, root: pathlib.Path, remedy: str = ""
) -> pathlib.Path | None:
  """The folder of the newest readable version of a prepared set, or None.

  Raises `DataError` if all versions are damaged or need TensorFlow, or if the
  folder `root` is inside the set. `remedy` tells the user what to do; the
  default is for copies that this program makes.
  """
  copies = []
  for path in root.glob(f"{name}/*/dataset_info.json"):
    version = path.parent.name.split(".")
    if all(map(str.isdecimal, version)):  # Unfinished copies have other names.
      problem = _problem(path, remedy)
      copies.append((not problem, [*map(int, version)], path.parent, problem))
  if not copies:
    for above in root.parents[:3]:
      if root.is_relative_to(above / name.partition("/")[0]) and any(
        above.glob(f"{name}/*/dataset_info.json")
      ):
        raise errors.DataError(
          f"{root} is inside a prepared {name}. {SET_DATA_DIR} {above}."
        )
    return None
  _, _, folder, problem = max(copies)  # Readable copies first, then newer ones.
  if problem:
    raise errors.DataError(problem)
  return folder


def _problem(path: pathlib.Path, remedy: str) -> str:
  """Why the copy with this dataset_info.json cannot be read, or ''."""
  try:
    info = files.parse_object(files.read_bytes(path))
  except (OSError, ValueError) as error:
    reason = f"{path.name}: {errors.one_line(error)}"
    return f"{path.parent} cannot be read ({reason}). {remedy or DELETE}"
  # Old versions of TFDS had only one format and did not name it.
  file_format = info.get("fileFormat", "tfrecord")
  if file_format == FILE_FORMAT:
    return ""
  other_dir = "another directory, which may be empty: a copy is prepared there."
  return (
    f"{path.parent} is prepared as {file_format!s:.50}, which needs TensorFlow;"
    f" it must be {FILE_FORMAT}. {remedy or f'{SET_DATA_DIR} {other_dir}'}"
  )


@contextlib.contextmanager
def reading(folder: pathlib.Path, remedy: str = DELETE) -> Iterator[None]:
  """Turns any exception from reading data in `folder` into a `DataError`."""
  try:
    yield
  except (errors.UserError, MemoryError):
    raise
  # TFDS, ArrayRecord and Pillow each raise exceptions of their own.
  except Exception as error:
    message = f"{folder} cannot be read ({errors.one_line(error)}). {remedy}"
    raise errors.DataError(message.rstrip()) from error


def label_names(folder: pathlib.Path) -> tuple[str, ...]:
  """The class names in the order of labels; may raise any exception."""
  path = folder / "label.labels.txt"
  lines = files.read_text(path).split("\n")
  if names := tuple(filter(None, map(str.strip, lines))):
    return names
  raise ValueError(f"{path.name} is empty")


def fingerprint(folder: pathlib.Path) -> str:
  """A digest of all files' names and contents; may raise any exception.

  For a copy of more than `files.READ_WHOLE` bytes, it covers all names and
  sizes, the text files, and samples of the start, middle and end of the others.
  """
  digest = hashlib.sha256()
  paths = sorted(each for each in folder.iterdir() if not each.is_dir())
  read_all = sum(path.stat().st_size for path in paths) <= files.READ_WHOLE
  for path in paths:
    digest.update(path.name.encode(errors="surrogateescape") + b"\0")
    if read_all:
      digest.update(bytes.fromhex(files.digest_of(path)))
      continue
    size = path.stat().st_size
    digest.update(b"%d\0" % size)
    if path.suffix in (".json", ".txt"):
      digest.update(files.read_text(path).encode())
      continue
    # Sizes are not enough: padding often gives different shards the same size.
    with files.open_regular(path) as file:
      for start in (0, size // 2, max(size - _SAMPLE, 0)):
        file.seek(start)
        digest.update(file.read(_SAMPLE))
  return digest.hexdigest()


@functools.lru_cache(1 << 14)
def _num_records(path: pathlib.Path) -> int:
  """The number of records in a file; cached, since it takes milliseconds."""
  from array_record.python import array_record_data_source as array_record

  return len(array_record.ArrayRecordDataSource([path]))


@dataclasses.dataclass(frozen=True)
class Records:
  """The images of an official split, in the files of a prepared copy."""

  folder: pathlib.Path  # The folder of the copy; messages name it.
  name: str  # The name of the split; messages name it.
  paths: list[pathlib.Path]  # The split's files, in the order of its records.
  records: Any  # ArrayRecord's source of the official split.
  num_classes: int  # Labels must be below it.
  remedy = ""  # Another copy has the same bad images.

  def examples(self, rows: np.ndarray) -> list[Callable[[], tuple[bytes, int]]]:
    """One function per row: it returns the encoded image and its label."""
    records = self.records.__getitems__(rows.tolist()) if len(rows) else ()
    return [functools.partial(self._parse, raw) for raw in records]

  def _parse(self, raw: bytes) -> tuple[bytes, int]:
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(raw).features.feature
    (encoded,) = feature["image"].bytes_list.value
    labels = feature["label"].int64_list.value
    if len(labels) != 1 or not 0 <= labels[0] < self.num_classes:
      most = self.num_classes - 1
      raise ValueError(f"its labels {labels} must be one from 0 to {most}")
    return encoded, labels[0]

  def place(self, row: int) -> str:
    """Describes where the image of a row is, for messages."""
    row_in_file = row
    for path in self.paths:
      if row_in_file < (count := _num_records(path)):
        break
      row_in_file -= count
    of_split = f"record {row}, from 0, of the split {self.name!r}"
    return f"{of_split} (record {row_in_file} of {path.name})"


def open_split(
  folder: pathlib.Path, name: str, num_images: int, num_classes: int
) -> Records:
  """Opens a split's files; raises any exception if they are damaged.

  It does not use TFDS, which would import any code that the copy names.
  """
  from array_record.python import array_record_data_source as array_record

  paths = sorted(folder.glob(f"*-{name}.{FILE_FORMAT}-*"))
  records = array_record.ArrayRecordDataSource(paths) if paths else ()
  if len(records) != num_images:
    has = f"it has {len(records)} images in {len(paths)} files"
    raise ValueError(f"{has} of the split {name!r}, not {num_images}")
  return Records(folder, name, paths, records, num_classes)


# ---- Sets that are decoded while training


def folder_of(config: ConfigDict) -> pathlib.Path:
  """The folder of a prepared copy; raises `DataError` if none can be read."""
  name, root = config.name.removeprefix(PREFIX), data_dir(config.data_dir)
  command = (
    "Prepare it with TFDS and TensorFlow, on any machine: import"
    f" tensorflow_datasets as tfds; tfds.builder({name!r})"
    f".download_and_prepare(file_format={FILE_FORMAT!r})."
  )
  folder = find(name, root, command)
  if folder is None:
    raise errors.DataError(
      f"there is no prepared {name} in {root / name}. {SET_DATA_DIR}"
      f" the TFDS data directory that holds one. {command}"
    )
  return folder


def read_facts(folder: pathlib.Path) -> tuple[types.Facts, str]:
  """A copy's facts, read without opening shards, and the split to score.

  This split is 'validation', else 'test', else 'train'. The last tenth of
  'train' is then scored, not trained on; TFDS has shuffled the images.
  """
  with reading(folder, PREPARE_AGAIN):
    info = json.loads(files.read_text(folder / "dataset_info.json"))
    counts = {
      str(split["name"]): sum(map(int, split["shardLengths"]))
      for split in info["splits"]
    }
    # 'validation' comes first, since ImageNet's 'test' has no labels.
    test = next((n for n in ("validation", "test") if n in counts), "train")
    num_train, num_test = counts.get("train", 0), counts.get(test, 0)
    if test == "train":
      if len(counts) > 1 or info.get("disableShuffling"):
        raise _unfit(folder, "it has no split 'validation' or 'test'")
      num_test = -(-num_train // 10)
      num_train -= num_test
    for split, count in (("train", num_train), (test, num_test)):
      if not 0 < count < 2**31:
        raise _unfit(folder, f"its {split!r} must have 1 to {2**31 - 1} images")
    stated = json.loads(files.read_text(folder / "features.json"))
    features = stated["featuresDict"]["features"]
    for name, kind in (("image", "image"), ("label", "classLabel")):
      if kind not in features.get(name, {}):
        raise _unfit(folder, f"its feature {name!r} has no {kind!r}")
    if (folder / "label.labels.txt").exists():
      labels = label_names(folder)
    else:  # As in TFDS, classes without names are named by their numbers.
      num_classes = int(features["label"]["classLabel"].get("numClasses", 0))
      if num_classes < 1:
        raise _unfit(folder, "its feature 'label' has no classes")
      labels = tuple(map(str, range(min(num_classes, 10**6))))
  return types.Facts(labels, num_train, num_test), test


def _unfit(folder: pathlib.Path, what: str) -> errors.DataError:
  """The error for a set that cannot be trained on, in this or another copy."""
  return errors.DataError(
    f"{folder} cannot be trained on: {what}. It must have the features image"
    " and label (a ClassLabel), and the splits train and validation or test, or"
    " train alone, shuffled by TFDS."
  )


def read(
  config: ConfigDict,
) -> tuple[list[tuple[Records, np.ndarray]], np.ndarray, tuple[str, ...], str]:
  """Opens training and test split.

  Returns each split's source and rows, the training labels, int32[N], the class
  names, and the set's name with a digest.
  """
  folder = folder_of(config)
  facts, test = read_facts(folder)
  sizes = {"train": facts.num_train}
  first_test = sizes.get(test, 0)  # Not 0 if the end of 'train' is scored.
  sizes[test] = first_test + facts.num_test
  with reading(folder, PREPARE_AGAIN):
    source = f"{config.name}-{folder.name}-{fingerprint(folder)[:16]}"
    sources = {
      name: open_split(folder, name, size, len(facts.class_names))
      for name, size in sizes.items()
    }
  _allow_open_files(sum(len(each.paths) for each in sources.values()))
  train = sources["train"], np.arange(facts.num_train)
  scored = sources[test], first_test + np.arange(facts.num_test)
  labels = np.zeros(facts.num_train, np.int32)  # Unknown before they are read.
  return [train, scored], labels, facts.class_names, source


def _allow_open_files(count: int) -> None:
  """Raises the limit on open files: ImageNet has more than shells allow."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = count + 256  # Libraries, pipes and checkpoints open files, too.
  for new_limit in (16 * needed, needed):  # The first suits several seeds.
    if soft < (allowed := min(new_limit, hard)):
      with contextlib.suppress(ValueError, OSError):  # macOS has another limit.
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
  if soft < needed:
    raise errors.DataError(
      f"the data set has {count} files, which are open at the same time, but a"
      f" process may open {soft} here. The hard limit (ulimit -Hn) must be"
      f" raised to {needed} or more."
    )
