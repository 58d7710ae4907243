"""Data sets that are larger than memory, read and decoded while training.

Any image classification set that TFDS has prepared as ArrayRecord, with the
features `image` (JPEG or PNG) and `label`; `folders` has another source.
Grain runs the worker processes; which image is read when is not its choice, so
that a run can go on at any step.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from resnet_flax.data import (
  crops,
  folders,
  pictures,
  prepared,
  randomness,
  types,
)
from resnet_flax.run import environment, errors, files, signals

_logger = logging.getLogger(__name__)

# Any other prepared copy is named by its folder: 'tfds/food101'.
PREFIX = "tfds/"
FOLDER = "folder"  # Of pictures: see `folders`.

# What is handed over at once, as each time costs milliseconds: 64 images of
# 224x224, or about as many bytes. Each worker or thread decodes one ahead.
_CHUNK = 64
_CHUNK_BYTES = 10_000_000
# Up to here a split that is the same in every epoch is kept decoded.
_IN_MEMORY_BYTES = 2**30
# With fewer images in an epoch than 10,000 of 224x224, worker processes, which
# take seconds to start, decode no faster than threads.
_WORKERS_BYTES = 10_000 * 224 * 224 * 3
# Why a worker may have ended, by a signal and by itself.
_KILLED = (
  "The system does that most likely for want of memory: pass a smaller"
  " --config.dataset.num_workers."
)
_NO_GUARD = (
  "A script must train under: if __name__ == '__main__'; otherwise see what the"
  " process says above, or set dataset.num_workers=0."
)
_BAD = -1  # Stands for the label of an image that is to be skipped.


# Sets that a network can be looked at and loaded for where there is no copy:
# names of the classes ('' if not known), training and test images.
_Known = tuple[tuple[str, ...], int, int]
KNOWN: dict[str, _Known] = {"imagenet2012": (("",) * 1000, 1_281_167, 50_000)}
_OF_RUN: dict[str, _Known] = {}


@contextlib.contextmanager
def remembering(name: str, known: _Known | None) -> Iterator[None]:
  """Within, `info` goes by what a run knows, whatever became of the data.

  After it, too, where there is no data.
  """
  if known:
    _OF_RUN[name] = known
    if name.startswith((PREFIX, FOLDER)):
      KNOWN[name] = known
  try:
    yield
  finally:
    _OF_RUN.clear()


def is_streamed(name: str) -> bool:
  """Whether a data set is decoded while training, or may be."""
  return name in (*KNOWN, FOLDER) or name.startswith(PREFIX)


def info(config: ConfigDict) -> types.DatasetInfo:
  """What is known of a set; `DataError` if only its data can tell that."""
  try:
    known = _OF_RUN.get(config.name) or _look(config)
  except errors.DataError:
    # `load` says what is wrong with the data.
    if config.name not in KNOWN:
      raise
    known = KNOWN[config.name]
  shape = (config.image_size, config.image_size, 3)
  names = tuple(filter(None, known[0]))
  return types.DatasetInfo(len(known[0]), shape, *known[1:], class_names=names)


def _look(config: ConfigDict) -> _Known:
  if config.name == FOLDER:
    return folders.facts(config)
  facts = read_facts(find(config.name, config.data_dir))
  return facts.class_names, facts.num_train, facts.num_test


def find(name: str, configured_dir: str) -> pathlib.Path:
  """The folder of a prepared copy; a `DataError` if none can be read."""
  name, root = name.removeprefix(PREFIX), prepared.data_dir(configured_dir)
  command = (
    "Prepare it with TFDS and TensorFlow, on any machine: import"
    f" tensorflow_datasets as tfds; tfds.builder({name!r})"
    f".download_and_prepare(file_format={prepared.FILE_FORMAT!r})."
  )
  folder = prepared.find(name, root, command)
  if folder is None:
    raise errors.DataError(
      f"there is no prepared {name} in {root / name}. {prepared.SET_DATA_DIR}"
      f" the TFDS data directory that holds one. {command}"
    )
  return folder


class Facts(NamedTuple):
  """What a copy says of itself."""

  num_train: int  # Images that are trained on.
  num_test: int  # Images that are scored.
  # Their split: 'validation', else 'test'; with neither, 'train', whose last
  # tenth it is (TFDS has shuffled it).
  test: str
  class_names: tuple[str, ...]


def read_facts(folder: pathlib.Path) -> Facts:
  """Reads what a copy says, without its shards; `DataError` if it does not."""
  with prepared.reading(folder, prepared.PREPARE_AGAIN):
    info = json.loads(files.read_text(folder / "dataset_info.json"))
    counts = {
      str(split["name"]): sum(map(int, split["shardLengths"]))
      for split in info["splits"]
    }
    features = prepared.check_features(folder)
    if not features["label"].HasField("class_label"):
      raise _unfit(folder, "its feature 'label' is no ClassLabel")
    # ImageNet's 'test' has no labels.
    test = next((n for n in ("validation", "test") if n in counts), "train")
    num_train, num_test = counts.get("train", 0), counts.get(test, 0)
    if test == "train":
      if len(counts) > 1 or info.get("disableShuffling"):
        raise _unfit(folder, "it has no split 'validation' or 'test'")
      num_test = -(-num_train // 10)
      num_train -= num_test
    for split, count in (("train", num_train), (test, num_test)):
      if not 0 < count < 2**31:
        raise _unfit(folder, f"it has no images in the split {split!r}")
    # As in TFDS, classes without names have numbers.
    num_classes = features["label"].class_label.num_classes
    labels = tuple(map(str, range(num_classes)))
    if (folder / "label.labels.txt").exists():
      labels = prepared.label_names(folder)
  return Facts(num_train, num_test, test, labels)


def _unfit(folder: pathlib.Path, what: str) -> errors.DataError:
  """The error for a set that another copy would not help."""
  return errors.DataError(
    f"{folder} cannot be trained on: {what}. It must have the features image"
    " and label (a ClassLabel), and the splits train and validation or test, or"
    " train alone."
  )


def load(
  config: ConfigDict, augmentation: str
) -> tuple[types.Dataset, np.ndarray | None]:
  """The official splits, or parts of the only one; `DataError` if none.

  And int32[N] labels of the training split, where they are known.
  """
  if config.name == FOLDER:
    with prepared.reading(pathlib.Path(config.data_dir), folders.Files.remedy):
      sources, class_names, source = folders.read(config)
    rows = [np.arange(len(each.paths)) for each in sources]
    labels = sources[0].labels
  else:
    sources, rows, class_names, source = _open_copy(config)
    labels = None
  # Before anything is compiled.
  if config.num_workers:
    _check_semaphores()
  crop = augmentation if augmentation in crops.RANDOM else "none"
  train, *others, test = (
    StreamedSplit(
      indices=indices,
      source=each,
      image_size=config.image_size,
      crop=crop if each is sources[0] else "none",
      num_workers=config.num_workers,
      num_crops=config.test_crops,
      skips_bad=config.bad_images == "skip",
    )
    for each, indices in zip(sources, rows, strict=True)
  )
  validation = others[0] if others else None
  return types.Dataset(train, validation, test, class_names, source), labels


def _open_copy(
  config: ConfigDict,
) -> tuple[list[Any], list[np.ndarray], tuple[str, ...], str]:
  """Sources of the training and test split, their rows, class names, name."""
  folder = find(config.name, config.data_dir)
  facts = read_facts(folder)
  digest = prepared.fingerprint(folder, prepared.PREPARE_AGAIN)
  with prepared.reading(folder, prepared.PREPARE_AGAIN):
    from array_record.python import array_record_data_source as array_record

    splits = prepared.open_builder(folder, ("train", facts.test)).info.splits
    sources = [
      Records(
        *(folder, name, array_record.ArrayRecordDataSource(shards), shards),
        len(facts.class_names),
      )
      for name in ("train", facts.test)
      for shards in [splits[name].file_instructions]
    ]
  _allow_open_files(sum(len(each.shards) for each in sources))
  first_test = facts.num_train if facts.test == "train" else 0
  rows = [np.arange(facts.num_train), first_test + np.arange(facts.num_test)]
  source = f"{config.name}-{folder.name}-{digest[:16]}"
  return sources, rows, facts.class_names, source


def settle(dataset: types.Dataset) -> types.Dataset:
  """Keeps the splits decoded that never change and fit into memory.

  Of a split that is scored, `bad_images=skip` leaves out the bad images. To
  find them, it is decoded whatever its size. Otherwise a `DataError` counts the
  bad images of all splits that were decoded.
  """
  bad: list[str] = []
  train = _settle(dataset.train, False, bad)
  held_out = dataset.validation and _settle(dataset.validation, True, bad)
  test = _settle(dataset.test, True, bad)
  if bad:
    source: Any = dataset.train.source  # type: ignore[attr-defined]
    raise errors.DataError(
      f"{source.folder} has {len(bad)} images that cannot be decoded, first"
      f" {bad[0]}. {source.remedy}"
    )
  return dataclasses.replace(
    dataset, train=train, validation=held_out, test=test
  )


def _settle(split: types.Split, is_scored: bool, bad: list[str]) -> types.Split:
  if not isinstance(split, StreamedSplit):
    return split
  size = len(split) * math.prod(split.image_shape)
  keep = split.crop == "none" and split.num_crops == 1
  keep = keep and size <= _IN_MEMORY_BYTES
  find_bad = is_scored and split.skips_bad
  if not (keep or find_bad):
    # What is wrong with all images is said before anything is compiled.
    dataclasses.replace(split, num_workers=0).take(np.arange(1))
    return split
  positions = np.arange(len(split))
  order = np.split(positions, range(_CHUNK, len(split), _CHUNK))
  whole = dataclasses.replace(split, skips_bad=True, skipped={})
  batches = [batch for batch in whole.batches(order) if keep]
  if not split.skips_bad:
    bad += whole.skipped.values()
  if find_bad:
    positions = positions[~np.isin(split.indices, list(whole.skipped))]
  if not keep:
    return split.subset(positions)
  images, labels = map(np.concatenate, zip(*batches, strict=True))
  indices = split.indices[positions]
  return DecodedSplit(images[positions], labels[positions], indices)


def _check_semaphores() -> None:
  """Checks that processes, which have some between them, can be started."""
  try:
    multiprocessing.Semaphore()
  except OSError as error:
    raise errors.DataError(
      "processes that decode images cannot be started, as there can be no"
      f" semaphore in /dev/shm ({error.strerror}). Make it writable and free"
      " some room there, or set dataset.num_workers=0."
    ) from error


def _allow_open_files(count: int) -> None:
  """For ImageNet, which has more files than the thousand that shells allow."""
  try:
    import resource
  except ImportError:  # There is no such limit on Windows.
    return
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  infinity = resource.RLIM_INFINITY  # On Linux it is -1.
  soft, hard = (sys.maxsize if n == infinity else n for n in limits)
  needed = count + 256  # Besides, there are libraries, pipes, checkpoints.
  for wanted in (16 * needed, needed):  # Of several seeds each has its own.
    if soft < (allowed := min(wanted, hard)):
      with contextlib.suppress(ValueError, OSError):  # macOS has another limit.
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, limits[1]))
        soft = allowed
  if soft < needed:
    raise errors.DataError(
      f"the data set has {count} files, which are open at the same time, but a"
      f" process may open {soft} here. Have the hard limit (ulimit -Hn) raised"
      f" to {needed} or more."
    )


class BadImage(ValueError):
  """An image that cannot be decoded: where it is, why, and what can be done."""

  remedy = ""


class DecodedSplit(types.ArraySplit):
  """A streamed split that was decoded: `images[k]` is that of `indices[k]`."""

  def batches(
    self, order: Sequence[np.ndarray], draw: types.Draw | None = None
  ) -> Iterator[types.Batch]:
    """See `Split`."""
    for positions in order:
      yield self.images[positions], self.labels[positions]


@dataclasses.dataclass(frozen=True)
class Records:
  """The images of an official split, in the files of a prepared copy."""

  folder: pathlib.Path  # This and the next are for messages.
  name: str  # Of the split.
  records: Any  # ArrayRecord's source of the official split.
  shards: Sequence[Any]  # TFDS's instructions for its files, for messages.
  num_classes: int  # Labels are below.
  remedy = folders.SKIP  # For a bad image, which another copy has as well.

  def examples(self, rows: np.ndarray) -> list[Callable[[], tuple[bytes, int]]]:
    """What gives the encoded image of a row and its label, or an exception."""
    records = self.records.__getitems__(rows.tolist()) if len(rows) else ()
    return [functools.partial(self._parse, raw) for raw in records]

  def _parse(self, raw: bytes) -> tuple[bytes, int]:
    """A serialised `tf.train.Example`."""
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(raw).features.feature
    (encoded,) = feature["image"].bytes_list.value
    (label,) = feature["label"].int64_list.value
    if not 0 <= label < self.num_classes:
      most = self.num_classes - 1
      raise ValueError(f"it has label {label}; needed: 0 to {most}")
    return encoded, label

  def place(self, row: int) -> str:
    """Where the image of a row is, for people."""
    of_split = f"record {row}, from 0, of the split {self.name!r}"
    for shard in self.shards:
      if row < shard.examples_in_shard:
        break
      row -= shard.examples_in_shard
    return f"{of_split} (record {row} of {os.path.basename(shard.filename)})"


@dataclasses.dataclass(frozen=True)
class StreamedSplit(types.Split):
  """Images that are decoded when they are wanted."""

  indices: np.ndarray  # Rows of the source.
  source: Records | folders.Files
  image_size: int  # Height and width of what is cut out of the images.
  crop: str  # With `draw`, of `crops.RANDOM`; 'none': the central square.
  # Processes that decode; 0: threads of this one, -1: one per CPU thread if
  # that is worth it.
  num_workers: int
  num_crops: int = 1  # 1, or 10, of each image where nothing is drawn.
  # Whether a bad image is replaced by the next good one of this split.
  skips_bad: bool = False
  # Which rows were, and why, as far as they have been met.
  skipped: dict[int, str] = dataclasses.field(default_factory=dict)

  @property
  def image_shape(self) -> tuple[int, ...]:
    """See `Split`."""
    return self.image_size, self.image_size, 3

  def take(self, positions: np.ndarray) -> types.Batch:
    """See `Split`; the central crop of each image."""
    one_crop = dataclasses.replace(self, num_crops=1)
    return types.Split.take(one_crop, positions)

  def batches(
    self, order: Sequence[np.ndarray], draw: types.Draw | None = None
  ) -> Iterator[types.Batch]:
    """See `Split`; workers live until the iterator ends or is closed.

    A `DataError` if an image cannot be read or a worker died.
    """
    grain = _import_grain()
    num_crops = self.num_crops if draw is None else 1
    image_bytes = num_crops * math.prod(self.image_shape)
    size = min(max(_CHUNK_BYTES // image_bytes, 1), _CHUNK)
    # Of an empty batch, too, there is one: for its shape.
    chunks = [
      np.split(positions, range(size, len(positions), size))
      for positions in order
    ]
    # Every worker gets these, and no other indices.
    rows = [(part, self.indices[part]) for parts in chunks for part in parts]
    none = self.indices[:0]
    lean = dataclasses.replace(self, indices=none, num_crops=num_crops)
    workers = self.num_workers
    if workers < 0:
      is_large = sum(map(len, order)) * image_bytes >= _WORKERS_BYTES
      workers = environment.num_cpu_threads() if is_large else 0
    workers = min(workers, len(rows))
    # A worker hands over what it has while its thread decodes.
    threads = 1 if workers else 2
    pipeline = grain.experimental.WithOptionsIterDataset(
      grain.MapDataset.source(rows)
      .map(functools.partial(lean._read, draw))
      .to_iter_dataset(grain.ReadOptions(threads, threads)),
      # Through pipes: shared memory is scarce in containers, which kills
      # workers, and outlives a process that is killed.
      grain.experimental.DatasetOptions(min_shm_size=sys.maxsize),
    ).mp_prefetch(
      grain.MultiprocessingOptions(workers, per_worker_buffer_size=1),
      worker_init_fn=_start_worker,
    )
    if workers:
      _check_semaphores()
      # Of a process that ends in an error; Python's helper cleans them up.
      os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    alive, iterator = _Workers(self.source.folder), iter(pipeline)
    # Threads of this process do not die by themselves.
    take = alive.next_of if workers else next
    try:
      with prepared.reading(self.source.folder, prepared.PREPARE_AGAIN):
        for positions, parts in zip(order, chunks, strict=True):
          arrays = [take(iterator) for _ in parts]
          images, labels = map(np.concatenate, zip(*arrays, strict=True))
          for k in np.flatnonzero(labels == _BAD):
            images[k], labels[k] = self._next_good(positions[k], draw)
          yield images, labels
    finally:
      alive.close(iterator)

  def _next_good(self, position: int, draw: types.Draw | None) -> types.Batch:
    """The image from `position` on that can be read, by position alone."""
    strict = dataclasses.replace(self, skips_bad=False)
    for other in np.roll(np.arange(len(self)), -position):
      row = self.indices[other]
      try:
        images, labels = strict._read(
          draw, (np.array([other]), np.array([row]))
        )
        return images[0], labels[0]
      except BadImage as error:
        if row not in self.skipped:
          self.skipped[row] = str(error)
          _logger.warning("bad image: %s; %d so far", error, len(self.skipped))
    name = self.source.name
    raise ValueError(f"no image of the split {name!r} can be read")

  def _read(self, draw: types.Draw | None, chunk) -> types.Batch:
    """Of the positions of a chunk and the indices that they have."""
    positions, rows = chunk
    return self._decode(draw, positions, rows, self.source.examples(rows))

  def _decode(
    self, draw: types.Draw | None, positions, rows, examples
  ) -> types.Batch:
    """Of a source's examples at these positions."""
    shape = (len(rows), self.num_crops, *self.image_shape)
    images, labels = np.empty(shape, np.uint8), np.empty(len(rows), np.int32)
    for k, example in enumerate(examples):
      rng = None
      if draw and self.crop != "none":
        purpose, position = randomness.Purpose.HOST_CROP, int(positions[k])
        rng = randomness.host_rng(draw.seed, purpose, draw.epoch, position)
      try:
        encoded, labels[k] = example()
        images[k] = self._cut(encoded, rng)
      except Exception as error:
        if not self.skips_bad:
          what = f"{self.source.place(rows[k])}: {errors.one_line(error)}"
          bad = BadImage(what)
          bad.remedy = self.source.remedy
          raise bad from error
        images[k], labels[k] = 0, _BAD
    return (images[:, 0] if self.num_crops == 1 else images), labels

  def _cut(self, encoded: bytes, rng: np.random.Generator | None) -> np.ndarray:
    """uint8[crops, S, S, 3]; Pillow's linear, with antialiasing."""
    from PIL import Image

    decoded = pictures.decode(encoded)
    if rng:
      boxes = [crops.RANDOM[self.crop](rng, *decoded.size)]
    elif self.num_crops > 1:
      boxes = crops.corners_and_centre(*decoded.size)
    else:
      boxes = [crops.scored(decoded.size, self.image_size)]
    size, method = (self.image_size,) * 2, Image.Resampling.BILINEAR
    cut = [np.asarray(decoded.resize(size, method, box=box)) for box in boxes]
    if self.num_crops > 1:
      cut += [image[:, ::-1] for image in cut]
    return np.stack(cut)


class _Workers:
  """The processes that Grain starts for an iterator.

  For one that is killed amid handing over Grain waits for ever: its pipe has an
  end in this process, too.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    self._folder, self._others = folder, set(multiprocessing.active_children())
    self._own: set[multiprocessing.process.BaseProcess] = set()

  def next_of(self, iterator: Iterator[Any]) -> Any:
    """What comes next; `DataError` if a worker was killed."""
    result: futures.Future[Any] = futures.Future()

    def take() -> None:
      try:
        result.set_result(next(iterator))
      except Exception as error:
        result.set_exception(error)

    threading.Thread(target=take, name="next images", daemon=True).start()
    while futures.wait([result], 0.2).not_done and not self._died():
      pass
    # Often enough for none to end unseen.
    died = self._died()
    error = result.exception() if result.done() else None
    # What Grain itself says of one.
    if error and "terminated unexpectedly" in str(error):
      died = died or errors.one_line(error)
    if result.done() and not (error and died):
      return result.result()
    raise errors.DataError(
      f"a process that decodes images of {self._folder} was ended ({died}). "
      + (_KILLED if "code -" in died else _NO_GUARD)
    ) from error

  def _died(self) -> str:
    self._own |= {
      child
      for child in multiprocessing.active_children()
      if child.name.startswith("grain-process-prefetch")
    } - self._others
    codes = [worker.exitcode for worker in self._own if worker.exitcode]
    return f"exit code {codes[0]}" if codes else ""

  def close(self, iterator: Any) -> None:
    """Ends all of them, and the iterator."""
    if not self._died():
      iterator.close()
    else:  # To close it would wait for those that died.
      for worker in self._own:
        worker.kill()


def _import_grain() -> Any:
  """Grain, where it is needed: it takes a second or two."""
  from absl import flags

  try:
    import grain
  except ImportError:
    message = "need Grain: pip install 'resnet_flax[streaming]'."
    raise errors.DataError(f"images that are streamed {message}") from None
  # It reads flags of its own, which absl refuses where none have been parsed,
  # as in a notebook. This lets them have their defaults.
  for name in flags.FLAGS:
    if name.startswith("grain_"):
      flags.FLAGS[name].present = 1
  return grain


def _start_worker(index: int, count: int) -> None:
  """Ties a worker to the process that it works for."""
  # Ctrl-C and schedulers signal all processes of a job. The parent decides
  # when to stop, and still needs batches for its last step.
  for number in signals.SIGNALS:
    signal.signal(number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent is not None

  def follow() -> None:
    parent.join()
    os._exit(1)

  # One that was killed closes nothing.
  threading.Thread(target=follow, name="parent", daemon=True).start()
