"""CIFAR-10 and CIFAR-100 through TFDS, as ArrayRecord, without TensorFlow."""

import hashlib
import json
import logging
import os
import pathlib
import sys
from typing import Any

import numpy as np

from resnet_flax import errors
from resnet_flax.datasets import archive, record

_logger = logging.getLogger(__name__)

_FILE_FORMAT = "array_record"

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


def data_dir(configured: str) -> pathlib.Path:
  """The TFDS data directory: as configured, else TFDS's own default."""
  chosen = configured or os.environ.get("TFDS_DATA_DIR", "")
  return pathlib.Path(chosen or "~/tensorflow_datasets").expanduser().resolve()


def find_prepared(name: str, root: pathlib.Path) -> pathlib.Path | None:
  """The newest prepared version of a data set that can be read, if any.

  Args:
    name: of the data set.
    root: the TFDS data directory.

  Raises:
    DataError: there is one, but only in a format that needs TensorFlow.
  """
  formats = {}
  for path in root.glob(f"{name}/*/dataset_info.json"):
    try:
      info = json.loads(path.read_text())
      version = tuple(map(int, path.parent.name.split(".")))
    except (OSError, ValueError):
      continue  # Not a version that TFDS has finished writing.
    # Files written before TFDS had a choice do not name their format.
    formats[version] = info.get("fileFormat", "tfrecord"), path.parent
  for _, (file_format, folder) in sorted(formats.items(), reverse=True):
    if file_format == _FILE_FORMAT:
      return folder
  if formats:
    _, (file_format, folder) = max(formats.items())
    raise errors.DataError(
      f"{folder} is prepared as {file_format}, which needs TensorFlow to read;"
      f" needed: {_FILE_FORMAT}. Set --config.dataset.data_dir (or"
      " TFDS_DATA_DIR) to another, also empty, directory to have a copy"
      " prepared there."
    )
  return None


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
    path = pathlib.Path(local_archive).expanduser()
    archive.verify(spec, path)
  else:
    _logger.info("no prepared %s in %s: downloading %s", name, root, spec.url)
    path = archive.fetch(spec, root / "downloads")
  contents = archive.read(spec, path)
  _logger.info("preparing %s in %s", name, root)
  try:
    builder = _make_builder(name, contents, root)
    builder.download_and_prepare(file_format=_FILE_FORMAT)
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
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
      with path.open("rb") as file:
        digest.update(path.name.encode() + b"\0")
        digest.update(hashlib.file_digest(file, "sha256").digest())
  except OSError as error:
    raise errors.DataError(f"{folder} cannot be read: {error}.") from error
  return digest.hexdigest()


def read(folder: pathlib.Path) -> record.Arrays:
  """Decodes a prepared folder.

  Raises:
    DataError: TFDS or the image decoder cannot read it.
  """
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(folder)
    arrays = {}
    for split in ("train", "test"):
      source = builder.as_data_source(split)
      _logger.info("decoding %d %s images", len(source), split)
      # One example at a time: the decoded list would be twice the memory.
      images = np.empty(
        (len(source), *builder.info.features["image"].shape), np.uint8
      )
      labels = np.empty(len(source), np.int32)
      for index in range(len(source)):
        example = source[index]
        images[index], labels[index] = example["image"], example["label"]
      arrays[f"{split}_images"] = images
      arrays[f"{split}_labels"] = labels
    names = tuple(builder.info.features["label"].names)
  except errors.UserError:
    raise
  # TFDS, ArrayRecord and PIL each raise their own kinds.
  except Exception as error:
    raise errors.DataError(
      f"{folder} cannot be read ({errors.one_line(error)}). Delete it"
      " to have it prepared again."
    ) from error
  return record.Arrays(**arrays, class_names=names)
