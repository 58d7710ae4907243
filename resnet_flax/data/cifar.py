"""CIFAR-10 and CIFAR-100 through TFDS, as ArrayRecord, without TensorFlow."""

import hashlib
import io
import logging
import operator
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from resnet_flax.data import archive, dataset as record, files, prepared
from resnet_flax.run import errors

_logger = logging.getLogger(__name__)

_IMAGE_SHAPE = (32, 32, 3)
# What the encoded images may be. PIL knows many more, of which some start
# other programs.
_ENCODINGS = ("PNG", "JPEG")
# URLs and digests are those that TFDS records for its own downloads.
ARCHIVES = {
  "cifar10": archive.ArchiveSpec(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    folder="cifar-10-batches-bin",
    files={
      "train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
      "test": ("test_batch.bin",),
    },
    images_per_file={"train": 10_000, "test": 10_000},
    labels=("label",),
    label_names={"label": "batches.meta.txt"},
    num_names={"label": 10},
  ),
  "cifar100": archive.ArchiveSpec(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    folder="cifar-100-binary",
    files={"train": ("train.bin",), "test": ("test.bin",)},
    images_per_file={"train": 50_000, "test": 10_000},
    labels=("coarse_label", "label"),
    label_names={
      "coarse_label": "coarse_label_names.txt",
      "label": "fine_label_names.txt",
    },
    num_names={"coarse_label": 20, "label": 100},
  ),
}


def prepare(name: str, root: pathlib.Path, local_archive: str) -> pathlib.Path:
  """Prepares a data set as ArrayRecord from its official archive.

  TFDS writes into a temporary folder and renames it when it is complete.

  Args:
    name: 'cifar10' or 'cifar100'.
    root: the TFDS data directory.
    local_archive: path of the binary archive, or '' to download it.

  Returns:
    The folder of the prepared version.

  Raises:
    DataError: the archive cannot be had, or the directory not be written.
  """
  spec = ARCHIVES[name]
  if local_archive:
    path = files.resolve(local_archive)
    archive.verify(spec, path)
  else:
    _logger.info("no prepared %s in %s: downloading %s", name, root, spec.url)
    path = archive.fetch(spec, root / "downloads")
  contents = archive.read(spec, path)
  _logger.info("preparing %s in %s", name, root)
  try:
    builder = _make_builder(name, contents, root)
    builder.download_and_prepare(file_format=prepared.FILE_FORMAT)
  # TFDS and ArrayRecord have kinds of their own for what a disk can do.
  except Exception as error:
    raise errors.DataError(
      f"{name} cannot be prepared in {root} ({errors.one_line(error)}). Set"
      " --config.dataset.data_dir (or TFDS_DATA_DIR) to a directory that can"
      " be written."
    ) from error
  return pathlib.Path(builder.data_dir)


def _make_builder(
  name: str, contents: archive.ArchiveContents, root: pathlib.Path
) -> Any:
  import tensorflow_datasets as tfds
  from PIL import Image
  from tensorflow_datasets.core import registered

  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  stock: Any = {
    "cifar10": tfds.image_classification.Cifar10,
    "cifar100": tfds.image_classification.Cifar100,
  }[name]

  # The stock builder reads files through TensorFlow; this one differs only in
  # where examples come from, so what it writes is the stock data set.
  with registered.skip_registration():

    class ArchiveBuilder(stock):
      """The stock data set, generated from a decoded archive."""

      def _split_generators(self, dl_manager):
        del dl_manager
        for label, names in contents.names.items():
          self.info.features[label].names = names
        return {split: self._examples(split) for split in contents.images}

      def _generate_examples(self, *args, **kwargs):
        raise AssertionError("examples come from _split_generators")

      def _examples(self, split):
        rows = zip(contents.images[split], contents.labels[split], strict=True)
        for index, (image, labels) in enumerate(rows):
          # PIL images are encoded by PIL; arrays would be by TensorFlow.
          yield (
            index,
            {
              "id": f"{split}_{index:05d}",
              "image": Image.fromarray(image),
              **dict(zip(contents.names, map(int, labels), strict=True)),
            },
          )

  ArchiveBuilder.name = name
  return ArchiveBuilder(data_dir=root)


def fingerprint(folder: pathlib.Path) -> str:
  """A digest of a prepared folder's files: names and contents.

  Two copies of one version may hold different pixels, for example if one was
  encoded with losses.

  Raises:
    DataError: a file cannot be read.
  """
  digest = hashlib.sha256()
  try:
    for path in sorted(folder.iterdir()):
      if path.is_dir():
        continue
      with files.open_regular(path) as file:
        digest.update(path.name.encode(errors="surrogateescape") + b"\0")
        digest.update(hashlib.file_digest(file, "sha256").digest())
  except OSError as error:
    raise prepared.damaged(folder, errors.one_line(error)) from error
  return digest.hexdigest()


def read(
  folder: pathlib.Path, num_examples: Mapping[str, int]
) -> record.Arrays:
  """Decodes a prepared folder.

  Args:
    folder: of one version.
    num_examples: how many each of the splits 'train' and 'test' must have.

  Raises:
    DataError: TFDS or the image decoder cannot read it, or it holds something
      else than labelled images of the right number, kind and size.
  """
  import tensorflow_datasets as tfds

  try:
    prepared.check_features(folder)
    builder = tfds.builder_from_directory(folder)
    arrays: dict[str, np.ndarray] = {}
    for split, count in num_examples.items():
      for path in builder.info.splits[split].filepaths:
        # `fingerprint` has seen the files of this folder, and no others.
        if pathlib.Path(path).parent != folder:
          raise ValueError(f"dataset_info.json leads to {path}")
      source = builder.as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()}
      )
      if len(source) != count:
        raise ValueError(
          f"it has {len(source)} {split} images; needed: {count}"
        )
      _logger.info("decoding %d %s images", count, split)
      # One example at a time: the decoded list would be twice the memory.
      images = np.empty((count, *_IMAGE_SHAPE), np.uint8)
      labels = np.empty(count, np.int32)
      for index in range(count):
        example = source[index]
        images[index] = _decode(example["image"])
        labels[index] = operator.index(example["label"])
      arrays[f"{split}_images"] = images
      arrays[f"{split}_labels"] = labels
    names = prepared.label_names(folder)
    if names != tuple(builder.info.features["label"].names):
      raise ValueError(f"label.labels.txt has {len(names)} names")
    decoded = record.Arrays(**arrays, class_names=names)
    record.check(decoded, folder.parent.name, _IMAGE_SHAPE)
  # TFDS, ArrayRecord and PIL each raise their own kinds.
  except Exception as error:
    raise prepared.damaged(folder, errors.one_line(error)) from error
  return decoded


def _decode(encoded: bytes) -> np.ndarray:
  """One image, uint8[32, 32, 3].

  Raises:
    ValueError: it has another mode or size; found before it is decoded.
    OSError, SyntaxError: it is no image, or a damaged one.
  """
  from PIL import Image

  with Image.open(io.BytesIO(encoded), formats=_ENCODINGS) as image:
    if image.mode != "RGB" or image.size != _IMAGE_SHAPE[:2]:
      raise ValueError(
        f"an image has mode {image.mode} and size {image.size}; needed: RGB and"
        f" {_IMAGE_SHAPE[:2]}"
      )
    return np.asarray(image)
