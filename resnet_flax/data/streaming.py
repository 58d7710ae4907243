"""Data sets that may be larger than memory, decoded while training.

Encoded images come from `prepared` (TFDS sets) or from `folders`. Grain runs
the processes in `workers`. It does not choose the order of images, so a run can
resume at any step.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from resnet_flax.data import (
  crops,
  folders,
  pictures,
  prepared,
  randomness,
  types,
  workers,
)
from resnet_flax.run import environment, errors, signals

_logger = logging.getLogger(__name__)

FOLDER = "folder"  # `dataset.name` of a folder of pictures: see `folders`.
_SKIP = "dataset.bad_images=skip leaves out bad images."

# A transfer costs milliseconds, so images are sent in chunks of at most 64
# images and 10 MB, or one image. Each worker or thread decodes one chunk ahead.
_CHUNK = 64
_CHUNK_BYTES = 10_000_000
# A split up to this size is decoded once, unless it has random or ten crops.
_IN_MEMORY_BYTES = 2**30
# Worker processes take seconds to start. If an epoch has fewer bytes than this
# (10,000 images of 224x224), they are no faster than threads.
_WORKERS_BYTES = 10_000 * 224 * 224 * 3
_BAD = -1  # The label of an image that must be skipped.

# Facts of sets: with these, networks can be shown and loaded without the data.
KNOWN = {"imagenet2012": types.Facts(("",) * 1000, 1_281_167, 50_000)}


def is_streamed(name: str) -> bool:
  """Whether a data set may be decoded while training."""
  return name in (*KNOWN, FOLDER) or name.startswith(prepared.PREFIX)


def info(config: ConfigDict, facts: types.Facts | None) -> types.DatasetInfo:
  """Facts about a set; `DataError` if they need data that is missing or bad."""
  try:
    if not facts and config.name == FOLDER:
      facts = folders.facts(config)
    elif not facts:
      facts, _ = prepared.read_facts(prepared.folder_of(config))
  except errors.DataError:
    # `load` reports what is wrong with the data.
    if config.name not in KNOWN:
      raise
    facts = KNOWN[config.name]
  return types.DatasetInfo(
    num_classes=len(facts.class_names),
    image_shape=(config.image_size, config.image_size, 3),
    num_train=facts.num_train,
    num_test=facts.num_test,
    class_names=tuple(filter(None, facts.class_names)),
  )


def load(
  config: ConfigDict, augmentation: str
) -> tuple[types.Dataset, np.ndarray]:
  """Opens a set; also returns int32[N] training labels, all 0 if unknown."""
  read: Any = folders.read if config.name == FOLDER else prepared.read
  # A picture may be removed while its folder is read.
  with prepared.reading(pathlib.Path(config.data_dir), folders.Files.remedy):
    parts, labels, class_names, source = read(config)
  # A lack of semaphores must end the run before anything is compiled.
  if config.num_workers:
    workers.check_semaphores()
  train, *validations, test = (
    StreamedSplit(
      indices=rows,
      source=each,
      image_size=config.image_size,
      crop=crops.RANDOM.get(augmentation),
      num_workers=config.num_workers,
      num_crops=config.test_crops,
      skips_bad=config.bad_images == "skip",
    )
    for each, rows in parts
  )
  validation = validations[0] if validations else None
  return types.Dataset(train, validation, test, class_names, source), labels


def settle(dataset: types.Dataset) -> types.Dataset:
  """Decodes the splits that fit into memory, and keeps them.

  Splits with random or ten crops are decoded while they are used. With
  `bad_images=skip`, scored splits lose their bad images; to find the bad
  images, a scored split of any size is decoded. Otherwise, bad images in
  decoded splits raise a `DataError` with their number.
  """
  bad: list[str] = []
  splits: dict[str, Any] = {
    name: _settle(split, name != "train", bad)
    for name, split in vars(dataset).items()
    if isinstance(split, StreamedSplit)
  }
  if bad:
    assert isinstance(dataset.train, StreamedSplit)
    source = dataset.train.source
    raise errors.DataError(
      f"{source.folder} has {len(bad)} images that cannot be decoded; the first"
      f" is {bad[0]}. {source.remedy}{_SKIP}"
    )
  return dataclasses.replace(dataset, **splits)


def _settle(
  split: "StreamedSplit", is_scored: bool, bad: list[str]
) -> types.Split:
  keep = (
    (is_scored or not split.crop)  # Scored images are never cut at random.
    and split.num_crops < crops.TEN_CROPS
    and len(split) * math.prod(split.image_shape) <= _IN_MEMORY_BYTES
  )
  find_bad = is_scored and split.skips_bad
  if not (keep or find_bad):
    # Decoding one image reports a fault of all images before any compilation.
    dataclasses.replace(split, num_workers=0).take(np.arange(1))
    return split
  positions = np.arange(len(split))
  order = np.split(positions, range(_CHUNK, len(split), _CHUNK))
  tolerant = dataclasses.replace(split, skips_bad=True, skipped={}, num_crops=1)
  batches = [batch for batch in tolerant.batches(order) if keep]
  if not split.skips_bad:
    bad += tolerant.skipped.values()
  if find_bad:
    positions = positions[~np.isin(split.indices, list(tolerant.skipped))]
  if not keep:
    return split.subset(positions)
  arrays = map(np.concatenate, zip(*batches, strict=True))
  decoded = types.ArraySplit(split.indices, *arrays, num_crops=split.num_crops)
  return decoded.subset(positions)


class BadImage(ValueError):
  """An image that cannot be decoded: its place and the reason."""


@dataclasses.dataclass(frozen=True)
class StreamedSplit(types.Split):
  """Images that are decoded each time they are read."""

  # `indices` are rows of the source.
  source: prepared.Records | folders.Files
  image_size: int  # Height and width of a crop.
  crop: crops.Random | None  # For `draw`. None: the central square.
  # Processes that decode. 0: threads of this process; -1: one per CPU thread if
  # the split is large.
  num_workers: int
  # Whether a bad image is replaced by the next good one of this split.
  skips_bad: bool = False
  # The rows replaced so far, each with its reason.
  skipped: dict[int, str] = dataclasses.field(default_factory=dict)

  @property
  def image_shape(self) -> tuple[int, ...]:
    """See `Split`."""
    return self.image_size, self.image_size, 3

  def batches(
    self, order: Sequence[np.ndarray], draw: types.Draw | None = None
  ) -> Iterator[types.Batch]:
    """See `Split`; workers live until the iterator ends or is closed."""
    grain = workers.import_grain()
    split = self if draw is None else self.one_crop()
    image_bytes = split.num_crops * math.prod(self.image_shape)
    size = min(max(_CHUNK_BYTES // image_bytes, 1), _CHUNK)
    # An empty batch has one chunk, too, which gives its arrays their shapes.
    chunks = [
      np.split(positions, range(size, len(positions), size))
      for positions in order
    ]
    items = [part for parts in chunks for part in parts]
    processes = self.num_workers
    if processes < 0:
      is_large = sum(map(len, order)) * image_bytes >= _WORKERS_BYTES
      processes = environment.num_cpu_threads() if is_large else 0
    processes = min(processes, len(items))
    # A worker process sends a chunk while its thread decodes the next.
    threads = 1 if processes else 2
    pipeline = grain.experimental.WithOptionsIterDataset(
      grain.MapDataset.source(items)
      .map(functools.partial(split._read, draw))
      .to_iter_dataset(grain.ReadOptions(threads, threads)),
      # Pipes carry the chunks: containers have little shared memory and kill
      # workers that exceed it. Shared memory also outlives a killed process.
      grain.experimental.DatasetOptions(min_shm_size=sys.maxsize),
    ).mp_prefetch(
      grain.MultiprocessingOptions(processes, per_worker_buffer_size=1),
      worker_init_fn=functools.partial(workers.start, signals.SIGNALS),
    )
    folder = self.source.folder
    if processes:  # Only processes can die unnoticed; threads cannot.
      pipeline = workers.watched(pipeline, folder)
    remedy = self.source.remedy or prepared.PREPARE_AGAIN
    with (
      contextlib.closing(iter(pipeline)) as iterator,
      prepared.reading(folder, remedy),
    ):
      for positions, parts in zip(order, chunks, strict=True):
        arrays = [next(iterator) for _ in parts]
        images, labels = map(np.concatenate, zip(*arrays, strict=True))
        for k in np.flatnonzero(labels == _BAD):
          images[k], labels[k] = split._next_good(positions[k], draw)
        yield images, labels

  def _next_good(self, position: int, draw: types.Draw | None) -> types.Batch:
    """The first good image from `position` on, so a resume finds it again."""
    for candidate in np.roll(np.arange(len(self)), -position):
      row = self.indices[candidate]
      (example,) = self.source.examples(np.array([row]))
      try:
        return self._decode(draw, candidate, example)
      except BadImage as error:
        if row not in self.skipped:
          self.skipped[row] = str(error)
          _logger.warning("bad image: %s; %d so far", error, len(self.skipped))
    name = self.source.name
    raise ValueError(f"no image of the split {name!r} can be read")

  def _read(self, draw: types.Draw | None, positions) -> types.Batch:
    """Decodes a chunk; with `skips_bad`, a bad image gets the label `_BAD`."""
    shape = (len(positions), self.num_crops, *self.image_shape)
    images = np.empty(shape, np.uint8)
    labels = np.full(len(positions), _BAD, np.int32)
    examples = self.source.examples(self.indices[positions])
    for k, example in enumerate(examples):
      try:
        images[k], labels[k] = self._decode(draw, positions[k], example)
      except BadImage as error:
        if not self.skips_bad:
          raise errors.DataError(
            f"{self.source.folder} cannot be read ({error})."
            f" {self.source.remedy}{_SKIP}"
          ) from error
    return (images[:, 0] if self.num_crops == 1 else images), labels

  def _decode(self, draw: types.Draw | None, position, example):
    """An image, uint8[S, S, 3] or uint8[crops, S, S, 3], and its label."""
    from PIL import Image

    try:
      encoded, label = example()
      decoded = pictures.decode(encoded)
      if draw and self.crop:
        purpose = randomness.Purpose.HOST_CROP
        rng = randomness.host_rng(draw.seed, purpose, draw.epoch, int(position))
        boxes = [self.crop(rng, *decoded.size)]
      elif self.num_crops == crops.TEN_CROPS:
        boxes = crops.corners_and_centre(*decoded.size)
      else:
        boxes = [crops.scored(decoded.size, self.image_size)]
      size, method = (self.image_size,) * 2, Image.Resampling.BILINEAR
      cut = [np.asarray(decoded.resize(size, method, box=box)) for box in boxes]
      if self.num_crops > 1:
        cut += [image[:, ::-1] for image in cut]
      return (np.stack(cut) if self.num_crops > 1 else cut[0]), label
    except Exception as error:
      place = self.source.place(self.indices[position])
      raise BadImage(f"{place}: {errors.one_line(error)}") from error
