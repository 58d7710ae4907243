"""CIFAR-10 and CIFAR-100 through TFDS, as ArrayRecord, without TensorFlow.

An official archive (binary version) is read only if its digest is right.
Layout: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import dataclasses
import logging
import pathlib
import sys
import tarfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tqdm
from ml_collections import ConfigDict

from resnet_flax.data import cache, pictures, prepared, types
from resnet_flax.run import errors, files

_logger = logging.getLogger(__name__)

_IMAGE_SHAPE = (32, 32, 3)
# Seconds without an answer or without a byte after which a download fails.
TIMEOUT = 15.0


@dataclasses.dataclass(frozen=True)
class Archive:
  """An official archive; URL, size and digest as TFDS records them."""

  url: str
  num_bytes: int
  sha256: str
  folder: str  # The folder that holds all members.
  files: dict[str, tuple[str, ...]]  # By split, 'train' and 'test'.
  # The text file of class names for each label byte of an image, in order.
  labels: dict[str, str]


ARCHIVES = {
  "cifar10": Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    num_bytes=170_052_171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    folder="cifar-10-batches-bin",
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
    folder="cifar-100-binary",
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

  If that fails, this raises `DataError` and leaves no file.
  """
  import pooch
  import requests

  name = archive.url.rsplit("/", 1)[-1]
  pooch.get_logger().setLevel("ERROR")

  def download(url: str, target: str, _: Any) -> None:
    left = archive.num_bytes
    with (
      requests.get(url, stream=True, timeout=TIMEOUT) as response,
      open(target, "wb") as file,
      tqdm.tqdm(total=left, unit="B", unit_scale=True, disable=None) as bar,
    ):
      response.raise_for_status()
      for block in response.iter_content(1 << 16):
        # A server that never stops sending must not fill the disk.
        if (left := left - len(block)) < 0:
          raise ValueError("the server sends more than the official archive")
        file.write(block)
        bar.update(len(block))

  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.DataError(
      f"the data directory {folder.parent} cannot be written:"
      f" {error.strerror}. {prepared.SET_DATA_DIR} another one."
    ) from error
  try:
    path = pooch.retrieve(
      archive.url, f"sha256:{archive.sha256}", name, folder, downloader=download
    )
  except (requests.RequestException, OSError, ValueError) as error:
    raise errors.DataError(
      f"could not download {archive.url} ({errors.one_line(error)})."
      f" Fetch {name} elsewhere and pass --config.dataset.archive=FILE; or set"
      " --config.dataset.data_dir (or TFDS_DATA_DIR) to a directory with a"
      " prepared ArrayRecord copy; or try --config=configs/quickstart.py, which"
      " needs no download."
    ) from error
  return pathlib.Path(path)


def verify(archive: Archive, path: pathlib.Path) -> None:
  """Raises `DataError` unless a local file is the official archive."""
  try:
    size = path.stat().st_size
    # A file of another size may take hours to read.
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


class Contents(NamedTuple):
  """The images and labels of an archive, and the names of its classes."""

  splits: dict[str, types.Batch]  # uint8[N, 32, 32, 3] and uint8[N, L] labels.
  names: dict[str, list[str]]  # The class names of each of the L labels.


def read_archive(archive: Archive, path: pathlib.Path) -> Contents:
  """Reads all images and labels of an archive whose digest is right."""
  with tarfile.open(path, "r:gz") as tar:
    files = ((member.name, tar.extractfile(member)) for member in tar)
    members = {name: file.read() for name, file in files if file}
  names = {
    label: members[f"{archive.folder}/{name}"].decode().split()
    for label, name in archive.labels.items()
  }
  splits = {}
  for split, file_names in archive.files.items():
    raw = b"".join(members[f"{archive.folder}/{name}"] for name in file_names)
    rows = np.frombuffer(raw, np.uint8).reshape(-1, len(names) + 3 * 32 * 32)
    labels, planes = np.split(rows, [len(names)], axis=1)
    images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    splits[split] = images, labels
  return Contents(splits, names)


# ---- The prepared copy


def load(
  config: ConfigDict, known: types.DatasetInfo
) -> tuple[types.Arrays, str]:
  """Returns all images, decoded, and their source; prepares a missing copy."""
  root = prepared.data_dir(config.data_dir)
  folder = prepared.find(config.name, root)
  if folder is None:
    folder = prepare(config.name, root, config.archive)
  digest = prepared.fingerprint(folder)
  key = f"{config.name}-{folder.name}-{digest[:16]}"
  cache_dir = cache.cache_dir(config.cache_dir)
  counts = {"train": known.num_train, "test": known.num_test}
  arrays = cache.cached(cache_dir, key, lambda: read(folder, counts))
  if (classes := len(arrays["class_names"])) != known.num_classes:
    raise errors.DataError(
      f"{folder} has {classes} classes; it must have {known.num_classes}."
    )
  return arrays, key


def prepare(name: str, root: pathlib.Path, local_archive: str) -> pathlib.Path:
  """Prepares a data set as ArrayRecord in `root`; returns its folder there.

  `local_archive` is the official binary archive, or '' to download it. TFDS
  gives the folder its final name once it is complete.
  """
  archive = ARCHIVES[name]
  if local_archive:
    verify(archive, path := errors.resolve(local_archive))
  else:
    url = archive.url
    _logger.info("no prepared %s in %s: downloading %s", name, root, url)
    path = fetch(archive, root / "downloads")
  _logger.info("preparing %s in %s", name, root)
  try:
    builder = _make_builder(name, read_archive(archive, path), root)
    builder.download_and_prepare(file_format=prepared.FILE_FORMAT)
  # TFDS and ArrayRecord raise exceptions of their own for disk errors.
  except Exception as error:
    raise errors.DataError(
      f"{name} cannot be prepared in {root} ({errors.one_line(error)})."
      f" {prepared.SET_DATA_DIR} a directory that can be written."
    ) from error
  return pathlib.Path(builder.data_dir)


def _make_builder(name: str, contents: Contents, root: pathlib.Path) -> Any:
  import tensorflow_datasets as tfds
  from PIL import Image
  from tensorflow_datasets.core import registered

  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  stock: Any = getattr(tfds.image_classification, name.capitalize())
  # The stock builder reads files through TensorFlow. This one only takes the
  # examples from elsewhere, so it writes the stock data set.
  with registered.skip_registration():

    class ArchiveBuilder(stock):
      def _split_generators(self, dl_manager):
        for label, names in contents.names.items():
          self.info.features[label].names = names
        return {split: self._examples(split) for split in contents.splits}

      def _examples(self, split):
        rows = zip(*contents.splits[split], strict=True)
        for index, (image, labels) in enumerate(rows):
          # PIL encodes PIL images; TensorFlow would encode arrays.
          example: dict[str, Any] = {"id": f"{split}_{index:05d}"}
          example["image"] = Image.fromarray(image)
          example |= zip(contents.names, map(int, labels), strict=True)
          yield index, example

  ArchiveBuilder.name = name
  return ArchiveBuilder(data_dir=root)


def read(folder: pathlib.Path, num_examples: Mapping[str, int]) -> types.Arrays:
  """Decodes a prepared folder; each split must have `num_examples` images."""
  arrays: types.Arrays = {}
  with prepared.reading(folder):
    names = prepared.label_names(folder)
    for split, count in num_examples.items():
      source = prepared.open_split(folder, split, len(names))
      if (found := len(source.records)) != count:
        raise ValueError(f"it has {found} {split} images, not {count}")
      _logger.info("decoding %d %s images", count, split)
      images = np.empty((count, *_IMAGE_SHAPE), np.uint8)
      labels = np.empty(count, np.int32)
      for k, example in enumerate(source.examples(np.arange(count))):
        encoded, labels[k] = example()
        image = pictures.decode(encoded)
        if image.size != _IMAGE_SHAPE[:2]:
          raise ValueError(f"an image has size {image.size}, not (32, 32)")
        images[k] = image
      arrays |= {f"{split}_images": images, f"{split}_labels": labels}
  return arrays | {"class_names": np.array(names)}
