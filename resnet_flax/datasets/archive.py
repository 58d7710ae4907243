"""The official CIFAR archives, binary version: fetched, checked and read.

Nothing here is ever unpickled, and nothing is extracted to disk: members are
read by their expected name and size, whatever else the archive holds.
Layout: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import dataclasses
import hashlib
import pathlib
import sys
import tarfile
import zlib

import numpy as np

from resnet_flax import errors

# Seconds without an answer or without a byte before a download is given up.
_TIMEOUT = 15.0
_IMAGE_BYTES = 3 * 32 * 32


@dataclasses.dataclass(frozen=True)
class ArchiveSpec:
  """Where an archive is and what is in it.

  Attributes:
    url: where it is downloaded from.
    sha256: digest of the whole file.
    folder: of all its members.
    files: names of the files of the splits 'train' and 'test'.
    images_per_file: images in each file of the splits.
    labels: names of an image's label bytes, in order.
    label_names: for each label, the text file with its names.
  """

  url: str
  sha256: str
  folder: str
  files: dict[str, tuple[str, ...]]
  images_per_file: dict[str, int]
  labels: tuple[str, ...]
  label_names: dict[str, str]


def fetch(spec: ArchiveSpec, folder: pathlib.Path) -> pathlib.Path:
  """Downloads the archive into `folder`, unless a good copy is there.

  Shows progress on a terminal. A failed or wrong download leaves no file.

  Raises:
    DataError: no network, a slow server, a wrong digest, no space.
  """
  import pooch
  import requests

  name = spec.url.rsplit("/", 1)[-1]
  pooch.get_logger().setLevel("ERROR")
  downloader = pooch.HTTPDownloader(
    progressbar=sys.stderr.isatty(), timeout=_TIMEOUT
  )
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.DataError(
      f"the data directory {folder.parent} cannot be written:"
      f" {error.strerror}. Set --config.dataset.data_dir (or TFDS_DATA_DIR) to"
      " another one."
    ) from error
  try:
    path = pooch.retrieve(
      spec.url, f"sha256:{spec.sha256}", name, folder, downloader=downloader
    )
  except (requests.RequestException, OSError, ValueError) as error:
    raise errors.DataError(
      f"could not download {spec.url} ({errors.one_line(error)})."
      f" Ways out: fetch {name} elsewhere and pass"
      " --config.dataset.archive=FILE; or point --config.dataset.data_dir (or"
      " TFDS_DATA_DIR) to a directory with a prepared ArrayRecord copy; or try"
      " --config=configs/quickstart.py, which needs no download."
    ) from error
  return pathlib.Path(path)


def verify(spec: ArchiveSpec, path: pathlib.Path) -> None:
  """Checks that a local file is the official archive.

  Raises:
    DataError: it cannot be read or its SHA-256 differs.
  """
  try:
    with path.open("rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise errors.DataError(
      f"dataset.archive={str(path)!r} cannot be read: {error.strerror}."
    ) from error
  if digest != spec.sha256:
    raise errors.DataError(
      f"dataset.archive={str(path)!r} is not the official archive: its SHA-256"
      f" is {digest}, not {spec.sha256}. Fetch the binary version again from"
      f" {spec.url}."
    )


@dataclasses.dataclass(frozen=True)
class ArchiveContents:
  """What an archive holds.

  Attributes:
    images: for each split uint8[N, 32, 32, 3].
    labels: for each split uint8[N, L], one column for each label.
    names: for each label its names.
  """

  images: dict[str, np.ndarray]
  labels: dict[str, np.ndarray]
  names: dict[str, list[str]]


def read(spec: ArchiveSpec, path: pathlib.Path) -> ArchiveContents:
  """Reads all images and labels of an archive.

  Raises:
    DataError: not a gzipped tar, a member missing, of another kind or size.
  """
  wanted = {
    f"{spec.folder}/{name}": spec.images_per_file[split]
    * (len(spec.labels) + _IMAGE_BYTES)
    for split, names in spec.files.items()
    for name in names
  }
  texts = {f"{spec.folder}/{name}" for name in spec.label_names.values()}
  found: dict[str, bytes] = {}
  try:
    with tarfile.open(path, "r:gz") as tar:
      for member in tar:
        if member.name not in wanted and member.name not in texts:
          continue
        limit = wanted.get(member.name, 1 << 16)
        exact = member.name in wanted
        if not member.isfile() or (
          member.size != limit if exact else member.size > limit
        ):
          raise errors.DataError(
            f"{path}: {member.name} has {member.size} bytes; needed: a file of"
            f" {'' if exact else 'at most '}{limit}."
          )
        stream = tar.extractfile(member)
        assert stream is not None  # A regular file, as checked above.
        found[member.name] = stream.read()
  except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
    raise errors.DataError(
      f"{path} cannot be read as a gzipped tar archive: {error}."
    ) from error
  missing = sorted((wanted.keys() | texts) - found.keys())
  if missing:
    raise errors.DataError(f"{path} lacks {', '.join(missing)}.")

  images, labels = {}, {}
  for split, files in spec.files.items():
    raw = b"".join(found[f"{spec.folder}/{name}"] for name in files)
    rows = np.frombuffer(raw, np.uint8).reshape(
      -1, len(spec.labels) + _IMAGE_BYTES
    )
    labels[split] = rows[:, : len(spec.labels)]
    planes = rows[:, len(spec.labels) :].reshape(-1, 3, 32, 32)
    images[split] = planes.transpose(0, 2, 3, 1)
  names = {
    label: found[f"{spec.folder}/{name}"].decode().split()
    for label, name in spec.label_names.items()
  }
  return ArchiveContents(images, labels, names)
