"""Data sets that are larger than memory, read and decoded while training.

Any image classification set that TFDS has prepared as ArrayRecord, with the
features `image` (JPEG or PNG) and `label`. Grain runs the worker processes;
which image is read when is not its choice, so that a run can go on at any step.
"""

import contextlib
import dataclasses
import io
import json
import math
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict

from resnet_flax.data import crops, prepared, randomness, types
from resnet_flax.run import environment, errors

T = TypeVar("T")

# Any other prepared copy is named by its folder: 'tfds/food101'.
PREFIX = "tfds/"

# What is handed over at once, as each time costs milliseconds: 64 images of
# 224x224, or about as many bytes. Each worker or thread decodes one ahead.
_CHUNK = 64
_CHUNK_BYTES = 10_000_000
# Where images are decoded in threads of this process.
_THREADS = 2
_ENCODINGS = ("JPEG", "PNG")
# ImageNet's largest has 61 million.
_MOST_PIXELS = 2**26
_MOST_EXAMPLES = 2**31 - 1
# One in so many is scored where there is but one split.
_HELD_OUT = 10


class Shard(NamedTuple):
  """A file of records; the names are those that ArrayRecord's reader wants."""

  filename: str
  skip: int  # Records before the first one.
  take: int
  examples_in_shard: int


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


@dataclasses.dataclass(frozen=True)
class Facts:
  """What a copy says of itself."""

  num_train: int  # Images that are trained on.
  num_test: int  # Images that are scored.
  # Their split: 'validation', else 'test'; with neither, 'train', whose last
  # tenth it is (TFDS has shuffled it).
  test: str
  class_names: tuple[str, ...]


def read_facts(folder: pathlib.Path) -> Facts:
  """Reads what a copy says, without its shards; `DataError` if it does not."""
  try:
    info = json.loads(prepared.read_text(folder / "dataset_info.json"))
    counts = {
      str(split["name"]): sum(map(int, split["shardLengths"]))
      for split in info["splits"]
    }
    # ImageNet's 'test' has no labels.
    test = next((n for n in ("validation", "test") if n in counts), "train")
    num_train, num_test = counts.get("train", 0), counts.get(test, 0)
    if test == "train":
      if len(counts) > 1 or info.get("disableShuffling"):
        raise ValueError("it has no split 'validation' or 'test'")
      num_test = -(-num_train // _HELD_OUT)
      num_train -= num_test
    for split, count in (("train", num_train), (test, num_test)):
      if not 0 < count <= _MOST_EXAMPLES:
        raise ValueError(f"it has no images in the split {split!r}")
    labels = prepared.label_names(folder)
    if not labels:
      raise ValueError("label.labels.txt is empty")
    return Facts(num_train, num_test, test, labels)
  # It may hold anything.
  except Exception as error:
    raise _damaged(folder, error) from error


def _damaged(folder: pathlib.Path, error: Exception) -> errors.DataError:
  problem = errors.one_line(error)
  return prepared.damaged(folder, problem, prepared.PREPARE_AGAIN)


def load(config: ConfigDict, augmentation: str) -> types.Dataset:
  """A copy's official splits, or parts of its only one; `DataError` if none."""
  folder = find(config.name, config.data_dir)
  facts = read_facts(folder)
  digest = prepared.fingerprint(folder, read_all=False)
  first_test = facts.num_train if facts.test == "train" else 0
  sizes = {"train": facts.num_train}
  sizes[facts.test] = first_test + facts.num_test
  train, test = (
    StreamedSplit(
      indices=indices,
      folder=folder,
      shards=_shards(folder, name, sizes[name]),
      image_size=config.image_size,
      num_classes=len(facts.class_names),
      crop=crop if crop in crops.RANDOM else "none",
      num_workers=config.num_workers,
      num_crops=config.test_crops,
    )
    for name, indices, crop in (
      ("train", np.arange(facts.num_train), augmentation),
      (facts.test, np.arange(first_test, sizes[facts.test]), "none"),
    )
  )
  _allow_open_files(len(train.shards) + len(test.shards))
  for split in (train, test):
    # What is wrong with all images is said before anything is compiled.
    dataclasses.replace(split, num_workers=0).take(np.arange(1))
  return types.Dataset(
    train=train,
    validation=None,
    test=test,
    class_names=facts.class_names,
    source=f"{config.name}-{folder.name}-{digest[:16]}",
  )


def _allow_open_files(count: int) -> None:
  """For ImageNet, which has more files than the thousand that shells allow."""
  try:
    import resource
  except ImportError:  # There is no such limit on Windows.
    return
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  infinity = resource.RLIM_INFINITY
  soft, hard = (sys.maxsize if n == infinity else n for n in limits)
  needed = count + 256  # Besides, there are libraries, pipes, checkpoints.
  # Of several seeds each has its own.
  for wanted in (16 * needed, needed):
    if soft < (allowed := min(wanted, hard)):
      # macOS has a limit besides.
      with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, limits[1]))
        soft = allowed
  if soft < needed:
    raise errors.DataError(
      f"the data set has {count} files, which are open at the same time, but a"
      f" process may open {soft} here. Have the hard limit (ulimit -Hn) raised"
      f" to {needed} or more."
    )


def _shards(folder: pathlib.Path, split: str, size: int) -> tuple[Shard, ...]:
  """The files of a split of `size` images, which are looked at, not opened."""
  import tensorflow_datasets as tfds

  try:
    prepared.check_features(folder)
    info = tfds.builder_from_directory(folder).info
    features = dict(info.features.items())
    kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    for feature, kind in kinds.items():
      if not isinstance(features.get(feature), kind):
        raise ValueError(f"it has no feature {feature!r} of that kind")
    shards = []
    for each in info.splits[split].file_instructions:
      path = pathlib.Path(each.filename)
      if path.parent != folder:
        raise ValueError(f"dataset_info.json leads to {path}")
      prepared.open_regular(path).close()
      records = each.skip, each.take, each.examples_in_shard
      shards.append(Shard(str(path), *records))
    if sum(shard.take for shard in shards) != size:
      raise ValueError(f"the split {split!r} has shards of another number")
    return tuple(shards)
  # TFDS has kinds of its own.
  except Exception as error:
    raise _damaged(folder, error) from error


@dataclasses.dataclass(frozen=True)
class StreamedSplit(types.Split):
  """Images in the files of a prepared copy."""

  indices: np.ndarray
  folder: pathlib.Path  # Of the copy, for messages.
  shards: tuple[Shard, ...]  # The files, in order.
  image_size: int  # Height and width of what is cut out of the images.
  num_classes: int  # Labels are below.
  crop: str  # With `draw`, of `crops.RANDOM`; 'none': the central square.
  # Processes that decode; 0: threads of this one, -1: one per CPU thread.
  num_workers: int
  num_crops: int = 1  # 1, or 10, of each image where nothing is drawn.

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

    Raises:
      DataError: an image cannot be read, or a worker died.
    """
    grain = _import_grain()
    num_crops = self.num_crops if draw is None else 1
    image_bytes = num_crops * math.prod(self.image_shape)
    size = min(max(_CHUNK_BYTES // image_bytes, 1), _CHUNK)
    chunks = [
      positions[start : start + size]
      for positions in order
      for start in range(0, len(positions), size)
    ]
    workers = min(self.num_workers, len(chunks))
    if workers < 0:
      workers = min(environment.num_cpu_threads(), len(chunks))
    form = self.image_size, self.num_classes, self.crop
    decoding = _Decoding(*form, draw, num_crops)
    # A worker hands over what it has while its thread decodes.
    threads = 1 if workers else _THREADS
    pipeline = grain.experimental.WithOptionsIterDataset(
      grain.MapDataset.source(_Records(self.shards, self.indices, chunks))
      .map(decoding)
      .to_iter_dataset(grain.ReadOptions(threads, threads)),
      # Through pipes: shared memory is scarce in containers, which kills
      # workers, and outlives a process that is killed.
      grain.experimental.DatasetOptions(min_shm_size=sys.maxsize),
    ).mp_prefetch(
      grain.MultiprocessingOptions(workers, per_worker_buffer_size=1),
      worker_init_fn=_start_worker,
    )
    alive, iterator = _Workers(self.folder), iter(pipeline)
    # Threads of this process do not die by themselves.
    take = alive.next_of if workers else next
    try:
      for positions in order:
        parts = [take(iterator) for _ in range(0, len(positions), size)]
        # One at least, for its shape: of the last batch a host may have none.
        parts = parts or [decoding(_Encoded(positions, ()))]
        images, labels = zip(*parts, strict=True)
        yield np.concatenate(images), np.concatenate(labels)
    except (errors.DataError, MemoryError):
      raise
    # Whatever a file makes the readers and decoders raise, here or there.
    except Exception as error:
      raise _damaged(self.folder, error) from error
    finally:
      alive.close(iterator)


class _Workers:
  """The processes that Grain starts for an iterator.

  For one that is killed amid handing over Grain waits for ever: its pipe has an
  end in this process, too.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    self._folder, self._others = folder, set(multiprocessing.active_children())
    self._own: set[multiprocessing.process.BaseProcess] = set()

  def next_of(self, iterator: Iterator[T]) -> T:
    """What comes next; `DataError` if a worker was killed."""
    parts: list[T] = []
    failures: list[Exception] = []

    def take() -> None:
      try:
        parts.append(next(iterator))
      except Exception as error:
        failures.append(error)

    thread = threading.Thread(target=take, name="next images", daemon=True)
    thread.start()
    thread.join(0.2)
    while thread.is_alive() and not self._died():
      thread.join(0.2)
    # Often enough for none to end unseen.
    died = self._died()
    if parts:
      return parts[0]
    error = failures[0] if failures else None
    # What Grain itself says of one.
    if error and "terminated unexpectedly" in str(error):
      died = died or errors.one_line(error)
    if error and not died:
      raise error
    raise errors.DataError(
      f"a process that decodes images of {self._folder} was ended ({died});"
      " if it says nothing itself, most likely for want of memory. Pass a"
      " smaller --config.dataset.num_workers."
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
  import grain
  from absl import flags

  # It reads flags of its own, which absl refuses where none have been parsed,
  # as in a notebook. This lets them have their defaults.
  if not flags.FLAGS.is_parsed():
    for name in flags.FLAGS:
      if name.startswith("grain_"):
        flags.FLAGS[name].present = 1
  return grain


def _start_worker(index: int, count: int) -> None:
  """Ties a worker to the process that it works for."""
  # Ctrl-C and schedulers signal all processes of a job. The parent decides
  # when to stop, and still needs batches for its last step.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent is not None

  def follow() -> None:
    parent.join()
    os._exit(1)

  # One that was killed closes nothing.
  threading.Thread(target=follow, name="parent", daemon=True).start()


class _Encoded(NamedTuple):
  """Records as they are in the prepared copy."""

  positions: np.ndarray  # int64[K], in the split.
  records: Sequence[bytes]  # The serialised `tf.train.Example`s.


class _Records:
  """What Grain reads from: chunk k is that of position k in the given order."""

  def __init__(self, shards, indices, chunks):
    self._shards, self._chunks, self._source = shards, chunks, None
    # Only those of the chunks: they are sent to every worker.
    self._rows = [indices[chunk] for chunk in chunks]

  def __repr__(self) -> str:
    return f"records of {len(self._shards)} files"

  def __len__(self) -> int:
    return len(self._chunks)

  def __getitem__(self, index: int) -> _Encoded:
    if self._source is None:
      from array_record.python import array_record_data_source as array_record

      self._source = array_record.ArrayRecordDataSource(list(self._shards))
    records = self._source.__getitems__(self._rows[index].tolist())
    return _Encoded(self._chunks[index], records)


@dataclasses.dataclass(frozen=True)
class _Decoding:
  """Makes arrays of records: uint8 images and int32[K] labels.

  Images are [K, S, S, 3], of several crops [K, crops, S, S, 3].
  """

  size: int
  num_classes: int
  crop: str
  draw: types.Draw | None
  num_crops: int = 1

  def __call__(self, encoded: _Encoded) -> types.Batch:
    from tensorflow_datasets.proto import tf_example_pb2

    count = len(encoded.records)
    shape = (count, self.num_crops, self.size, self.size, 3)
    images, labels = np.empty(shape, np.uint8), np.empty(count, np.int32)
    for k, (position, raw) in enumerate(zip(*encoded, strict=True)):
      feature = tf_example_pb2.Example.FromString(raw).features.feature
      (image,) = feature["image"].bytes_list.value
      (label,) = feature["label"].int64_list.value
      if not 0 <= label <= (most := self.num_classes - 1):
        raise ValueError(f"an image has label {label}; needed: 0 to {most}")
      self._decode(image, int(position), images[k])
      labels[k] = label
    return (images[:, 0] if self.num_crops == 1 else images), labels

  def _decode(self, encoded: bytes, position: int, crops_of: np.ndarray):
    """Fills uint8[crops, S, S, 3]; Pillow's linear, with antialiasing."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded), formats=_ENCODINGS) as image:
      if image.width * image.height > _MOST_PIXELS:
        raise ValueError(f"an image has {image.width} x {image.height} pixels")
      image.load()  # Only now it is decoded.
      # Some of ImageNet's are grey. The others need not be copied.
      decoded = image if image.mode == "RGB" else image.convert("RGB")
    for k, box in enumerate(self._boxes(position, *decoded.size)):
      crops_of[k] = decoded.resize(
        (self.size, self.size), Image.Resampling.BILINEAR, box=box
      )
    if self.num_crops > 1:
      half = self.num_crops // 2
      crops_of[half:] = crops_of[:half, :, ::-1]

  def _boxes(self, position: int, width: int, height: int) -> list[crops.Box]:
    if self.num_crops > 1:
      return crops.corners_and_centre(width, height)
    if self.draw is None or self.crop == "none":
      return [crops.central(width, height)]
    purpose = randomness.Purpose.HOST_CROP
    seed, epoch = self.draw
    rng = randomness.host_rng(seed, purpose, epoch, position)
    return [crops.RANDOM[self.crop](rng, width, height)]
