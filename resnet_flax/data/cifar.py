"""CIFAR-10 and CIFAR-100, prepared by TFDS as ArrayRecord without TensorFlow.

An official archive (binary version) is read only if its digest is right.
Layout: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import contextlib
import dataclasses
import logging
import pathlib
import sys
import tarfile
from typing import Any

import numpy as np
import tqdm
from ml_collections import ConfigDict

from resnet_flax.data import cache, pictures, prepared, types
from resnet_flax.run import errors, files

_logger = logging.getLogger(__name__)

# A download fails after this many seconds without an answer or a byte.
TIMEOUT = 15.0


@dataclasses.dataclass(frozen=True)
class Archive:
  """An official archive; URL, size and digest as TFDS records them."""

  url: str
  num_bytes: int
  sha256: str
  files: dict[str, tuple[str, ...]]  # By split, 'train' and 'test'.
  # For each label byte of an image, in order: the text file of class names.
  labels: dict[str, str]


ARCHIVES = {
  "cifar10": Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    num_bytes=170_052_171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    files={
      "train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
      "test": ("test_batch.bin",),
    },
    labels={"label": "batches.meta.txt"},
  ),
  "cifar100": Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    num_bytes=168_513_733,
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    files={"train": ("train.bin",), "test": ("test.bin",)},
    labels={
      "coarse_label": "coarse_label_names.txt",
      "label": "fine_label_names.txt",
    },
  ),
}


# ---- The official archives


def fetch(archive: Archive, folder: pathlib.Path) -> pathlib.Path:
  """Downloads an archive into `folder`, unless a good copy is there.

  Raises `DataError` and leaves no file if the download fails.
  """
  import pooch
  import requests

  name = archive.url.rsplit("/", 1)[-1]
  pooch.get_logger().setLevel("ERROR")

  def download(url: str, target: str, _: Any) -> None:
    num_left = archive.num_bytes
    with (
      requests.get(url, stream=True, timeout=TIMEOUT) as response,
      open(target, "wb") as file,
      tqdm.tqdm(total=num_left, unit="B", unit_scale=True, disable=None) as bar,
    ):
      response.raise_for_status()
      for block in response.iter_content(1 << 16):
        # A server that never stops sending must not fill the disk.
        if (num_left := num_left - len(block)) < 0:
          raise ValueError("the server sends more than the official archive")
        file.write(block)
        bar.update(len(block))

  try:
    path = pooch.retrieve(
      archive.url, f"sha256:{archive.sha256}", name, folder, downloader=download
    )
  except (requests.RequestException, OSError, ValueError) as error:
    raise errors.DataError(
      f"could not download {archive.url} to {folder}"
      f" ({errors.one_line(error)}). Fetch {name} elsewhere and pass"
      " --config.dataset.archive=FILE; or set --config.dataset.data_dir (or"
      " TFDS_DATA_DIR) to a directory with a prepared ArrayRecord copy; or try"
      " --config=configs/quickstart.py, which needs no download."
    ) from error
  return pathlib.Path(path)


def verify(archive: Archive, path: pathlib.Path) -> None:
  """Raises `DataError` unless a local file is the official archive."""
  try:
    size = path.stat().st_size
    # Reading may take hours, so a file of another size is not read.
    digest = files.digest_of(path) if size == archive.num_bytes else "unknown"
  except OSError as error:
    raise errors.DataError(
      f"dataset.archive={str(path)!r} cannot be read: {error.strerror}."
    ) from error
  if digest != archive.sha256:
    raise errors.DataError(
      f"dataset.archive={str(path)!r} is not the official archive: it has"
      f" {size} bytes and the SHA-256 {digest}, and must have"
      f" {archive.num_bytes} and {archive.sha256}. Fetch the binary version"
      f" again from {archive.url}."
    )


def read_archive(
  archive: Archive, path: pathlib.Path
) -> tuple[dict[str, types.Batch], dict[str, list[str]]]:
  """Reads an official archive, whose digest must have been checked.

  Returns uint8[N, 32, 32, 3] images and uint8[N, L] labels of each split, and
  the class names of each of the L labels.
  """
  with tarfile.open(path, "r:gz") as tar:
    files = ((member.name, tar.extractfile(member)) for member in tar)
    members = {name.split("/")[-1]: file.read() for name, file in files if file}
  names = {
    label: members[name].decode().split()
    for label, name in archive.labels.items()
  }
  splits = {}
  for split, file_names in archive.files.items():
    raw = b"".join(members[name] for name in file_names)
    rows = np.frombuffer(raw, np.uint8).reshape(-1, len(names) + 3 * 32 * 32)
    labels, planes = np.split(rows, [len(names)], axis=1)
    images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    splits[split] = images, labels
  return splits, names


# ---- The prepared copy


def load(
  config: ConfigDict, known: types.DatasetInfo
) -> tuple[types.Arrays, str]:
  """Returns all images, decoded, and their source; prepares a missing copy."""
  root = prepared.data_dir(config.data_dir)
  folder = prepared.find(config.name, root)
  if folder is None:
    folder = prepare(config.name, root, config.archive)
  with prepared.reading(folder):
    key = f"{config.name}-{folder.name}-{prepared.fingerprint(folder)[:16]}"
  cache_dir = cache.cache_dir(config.cache_dir)
  arrays = cache.cached(cache_dir, key, lambda: read(folder, known))
  if arrays.keys() != _ARRAYS:
    raise errors.DataError(
      f"{cache_dir / key} must have the arrays of {config.name}. Delete"
      " it: the next start builds it again."
    )
  return arrays, key


def prepare(name: str, root: pathlib.Path, local_archive: str) -> pathlib.Path:
  """Prepares a data set as ArrayRecord in `root`; returns its folder there.

  `local_archive` is the official binary archive, or '' to download it. TFDS
  gives the folder its final name once it is complete.
  """
  import tensorflow_datasets as tfds
  from PIL import Image
  from tensorflow_datasets.core import registered

  archive = ARCHIVES[name]
  if local_archive:
    verify(archive, path := errors.resolve(local_archive, "dataset.archive"))
  else:
    url = archive.url
    _logger.info("no prepared %s in %s: downloading %s", name, root, url)
    path = fetch(archive, root / "downloads")
  _logger.info("preparing %s in %s", name, root)
  splits, class_names = read_archive(archive, path)
  stock: Any = getattr(tfds.image_classification, name.capitalize())
  # The stock builder reads files through TensorFlow. This one only takes its
  # examples from `splits` instead, so it writes the same data set.
  with registered.skip_registration():

    class ArchiveBuilder(stock):
      def _split_generators(self, dl_manager):
        for label, names in class_names.items():
          self.info.features[label].names = names
        return {split: self._examples(split) for split in splits}

      def _examples(self, split):
        for k, (image, labels) in enumerate(zip(*splits[split], strict=True)):
          # TFDS encodes PIL images with PIL, but arrays with TensorFlow.
          example = {"id": f"{split}_{k:05d}", "image": Image.fromarray(image)}
          example |= zip(class_names, labels.tolist(), strict=True)
          yield k, example

  ArchiveBuilder.name = name
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  try:
    builder = ArchiveBuilder(data_dir=root)
    builder.download_and_prepare(file_format=prepared.FILE_FORMAT)
  # TFDS and ArrayRecord raise exceptions of their own for disk errors.
  except Exception as error:
    with contextlib.suppress(errors.DataError):
      if folder := prepared.find(name, root):
        return folder  # Another process has prepared it meanwhile.
    raise errors.DataError(
      f"{name} cannot be prepared in {root} ({errors.one_line(error)})."
      f" {prepared.SET_DATA_DIR} a directory that can be written."
    ) from error
  return pathlib.Path(builder.data_dir)


_ARRAYS = {
  *("train_images", "train_labels", "test_images", "test_labels"),
  "class_names",
}


def read(folder: pathlib.Path, known: types.DatasetInfo) -> types.Arrays:
  """Decodes a copy; `DataError` if its counts or shapes differ from `known`."""
  arrays: types.Arrays = {}
  with prepared.reading(folder):
    names = prepared.label_names(folder)
    if len(names) != known.num_classes:
      raise ValueError(f"it has {len(names)} classes, not {known.num_classes}")
    for split, count in (("train", known.num_train), ("test", known.num_test)):
      source = prepared.open_split(folder, split, count, known.num_classes)
      _logger.info("decoding %d %s images", count, split)
      images = np.empty((count, *known.image_shape), np.uint8)
      labels = np.empty(count, np.int32)
      # Records may be much larger than their file: 64 are read at a time.
      for rows in np.split(np.arange(count), range(64, count, 64)):
        for k, example in zip(rows, source.examples(rows), strict=True):
          encoded, labels[k] = example()
          image = np.asarray(pictures.decode(encoded))
          if image.shape != known.image_shape:
            raise ValueError(f"an image has shape {image.shape}")
          images[k] = image
      arrays |= {f"{split}_images": images, f"{split}_labels": labels}
  return arrays | {"class_names": np.array(names)}
