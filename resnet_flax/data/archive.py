"""The official CIFAR archives, binary version: fetched, checked and read.

Nothing here is ever unpickled, and nothing is extracted to disk: members are
read by their expected name and size, whatever else the archive holds. Nothing
that an archive claims decides how much is read, kept or waited for.
Layout: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import dataclasses
import hashlib
import pathlib
import sys
import tarfile
import zlib
from typing import Any, BinaryIO

import numpy as np

from resnet_flax.data import files
from resnet_flax.run import errors

# Seconds without an answer or without a byte before a download is given up.
_TIMEOUT = 15.0
_IMAGE_BYTES = 3 * 32 * 32
# Of a text file with names, which are a hundred short words at most.
_TEXT_BYTES = 1 << 16
# Headers, padding and what else may be in an archive, such as a readme.
_SPARE_BYTES = 1 << 24
_MAX_MEMBERS = 1000
_CHUNK = 1 << 16


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
    num_names: for each label, how many names it has.
  """

  url: str
  sha256: str
  folder: str
  files: dict[str, tuple[str, ...]]
  images_per_file: dict[str, int]
  labels: tuple[str, ...]
  label_names: dict[str, str]
  num_names: dict[str, int]

  def member_sizes(self) -> dict[str, int]:
    """Bytes of each file of the splits, by the member's name."""
    row = len(self.labels) + _IMAGE_BYTES
    return {
      f"{self.folder}/{name}": self.images_per_file[split] * row
      for split, names in self.files.items()
      for name in names
    }

  def max_bytes(self) -> int:
    """More than the archive can have, compressed or not."""
    texts = len(self.label_names) * _TEXT_BYTES
    return sum(self.member_sizes().values()) + texts + _SPARE_BYTES


def fetch(spec: ArchiveSpec, folder: pathlib.Path) -> pathlib.Path:
  """Downloads the archive into `folder`, unless a good copy is there.

  Shows progress on a terminal. A failed or wrong download leaves no file.

  Raises:
    DataError: no network, a slow server, one that sends too much, a wrong
      digest, no space.
  """
  import pooch
  import requests

  name = spec.url.rsplit("/", 1)[-1]
  pooch.get_logger().setLevel("ERROR")
  http = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=_TIMEOUT)

  def download(url: str, target: str, caller: Any) -> None:
    with open(target, "wb") as file:
      http(url, _Limited(file, spec.max_bytes()), caller)

  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.DataError(
      f"the data directory {folder.parent} cannot be written:"
      f" {error.strerror}. Set --config.dataset.data_dir (or TFDS_DATA_DIR) to"
      " another one."
    ) from error
  if (folder / name).exists() and not (folder / name).is_file():
    # Pooch would wait for what a pipe holds.
    raise errors.DataError(f"{folder / name} is no file. Delete it.")
  try:
    path = pooch.retrieve(
      spec.url, f"sha256:{spec.sha256}", name, folder, downloader=download
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


class _Limited:
  """A file to write to, which a server without end cannot make fill a disk."""

  def __init__(self, file: BinaryIO, limit: int):
    self._left, self._write, self.flush = limit, file.write, file.flush

  def write(self, data: bytes) -> None:
    """Writes, unless it would go beyond the limit: that is a ValueError."""
    self._left -= len(data)
    if self._left < 0:
      raise ValueError("it sends more than the official archive has")
    self._write(data)


def verify(spec: ArchiveSpec, path: pathlib.Path) -> None:
  """Checks that a local file is the official archive.

  Raises:
    DataError: it cannot be read or its SHA-256 differs.
  """
  try:
    with files.open_regular(path) as file:
      size = file.seek(0, 2)
      if size > spec.max_bytes():
        raise errors.DataError(
          f"dataset.archive={str(path)!r} is not the official archive: it has"
          f" {size} bytes. Fetch the binary version again from {spec.url}."
        )
      file.seek(0)
      digest = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise errors.DataError(
      f"dataset.archive={str(path)!r} cannot be read: {files.describe(error)}."
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

  Whatever the file holds, this takes memory and time in proportion to what
  the official archive holds.

  Raises:
    DataError: not a gzipped tar, a member missing, twice, of another kind or
      size, a wrong number of names, a label without a name.
  """
  try:
    with files.open_regular(path) as file:
      found = _read_members(spec, path, file)
  except errors.DataError:
    raise
  # The kinds that tarfile raises for a damaged header are not documented.
  except Exception as error:
    raise errors.DataError(
      f"{path} cannot be read as a gzipped tar archive"
      f" ({errors.one_line(error)})."
    ) from error

  names = {
    label: _parse_names(path, file_name, found, spec.num_names[label])
    for label, file_name in (
      (label, f"{spec.folder}/{name}")
      for label, name in spec.label_names.items()
    )
  }
  images, labels = {}, {}
  for split, split_files in spec.files.items():
    raw = b"".join(found[f"{spec.folder}/{name}"] for name in split_files)
    rows = np.frombuffer(raw, np.uint8).reshape(
      -1, len(spec.labels) + _IMAGE_BYTES
    )
    labels[split] = rows[:, : len(spec.labels)]
    for label, column in zip(spec.labels, labels[split].T, strict=True):
      if column.max() >= len(names[label]):
        raise errors.DataError(
          f"{path}: the {split} split has a {label} of {column.max()}; needed:"
          f" 0 to {len(names[label]) - 1}."
        )
    planes = rows[:, len(spec.labels) :].reshape(-1, 3, 32, 32)
    images[split] = planes.transpose(0, 2, 3, 1)
  return ArchiveContents(images, labels, names)


def _read_members(
  spec: ArchiveSpec, path: pathlib.Path, file: BinaryIO
) -> dict[str, bytes]:
  wanted = spec.member_sizes()
  texts = {f"{spec.folder}/{name}" for name in spec.label_names.values()}
  found: dict[str, bytes] = {}
  # For a stream tarfile needs no more than `read`; its type says otherwise.
  stream: Any = _Inflated(file, spec.max_bytes())
  with tarfile.open(
    fileobj=stream, mode="r|", bufsize=_CHUNK, tarinfo=_Member
  ) as tar:
    for count, member in enumerate(tar):
      if count == _MAX_MEMBERS:
        raise errors.DataError(f"{path} has more than {count} members.")
      if member.name not in wanted and member.name not in texts:
        continue
      limit = wanted.get(member.name, _TEXT_BYTES)
      exact = member.name in wanted
      if not member.isfile() or (
        member.size != limit if exact else member.size > limit
      ):
        kind = "" if member.isfile() else "is no plain file, "
        raise errors.DataError(
          f"{path}: {member.name} {kind}has {member.size} bytes; needed: a file"
          f" of {'' if exact else 'at most '}{limit}."
        )
      if member.name in found:
        raise errors.DataError(f"{path} has {member.name} twice.")
      content = tar.extractfile(member)
      assert content is not None  # A regular file, as checked above.
      found[member.name] = content.read()
  missing = sorted((wanted.keys() | texts) - found.keys())
  if missing:
    raise errors.DataError(f"{path} lacks {', '.join(missing)}.")
  # The checksum of the whole comes last.
  while not stream.ended:
    stream.read(_CHUNK)
  return found


def _parse_names(
  path: pathlib.Path, member: str, found: dict[str, bytes], count: int
) -> list[str]:
  try:
    names = found[member].decode().split()
  except UnicodeDecodeError as error:
    raise errors.DataError(f"{path}: {member} is not UTF-8.") from error
  if len(names) != count or len(set(names)) != count:
    raise errors.DataError(
      f"{path}: {member} has {len(names)} names, {len(set(names))} of them"
      f" different; needed: {count}."
    )
  return names


class _Inflated:
  """What a gzip file holds, to be read forwards and up to a limit.

  `gzip` knows no limit, and goes through any number of empty streams.

  Attributes:
    ended: whether all has been read, and its checksum was right.
  """

  def __init__(self, file: BinaryIO, limit: int):
    self._file, self._left = file, limit
    self._inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    self.ended = False

  def read(self, size: int) -> bytes:
    """Some bytes, at most `size`; none, once, at the end.

    Raises:
      EOFError: the file is cut short, or is read beyond its end.
      ValueError: it holds more than the limit.
      zlib.error: it is damaged.
    """
    if self.ended:
      # To skip what is not there, tarfile would go on and on.
      raise EOFError("a member goes beyond the end")
    while not self._inflater.eof:
      raw = self._inflater.unconsumed_tail or self._file.read(_CHUNK)
      data = self._inflater.decompress(raw, size)
      self._left -= len(data)
      if self._left < 0:
        raise ValueError("it holds more than the official archive")
      if data:
        return data
      if not raw:
        raise EOFError("it is cut short")
    self.ended = True
    return b""


class _Member(tarfile.TarInfo):
  """A member as its own header describes it.

  What extends headers is skipped: it can claim any size, Python 3.11 takes
  very long to parse some of it, and the official archives need none of it.
  """

  @classmethod
  def frombuf(cls, buf, encoding, errors):
    """Parses a header, bytes[512]; see the base class."""
    member = super().frombuf(buf, encoding, errors)
    if member.size < 0:
      # tarfile would go backwards, and round in circles.
      raise tarfile.ReadError("a member of negative size")
    if member.type in _EXTENSIONS:
      member.type = _SKIPPED
    return member


# What tarfile does not know it skips.
_SKIPPED = b"?"
_EXTENSIONS = (
  tarfile.XHDTYPE,
  tarfile.XGLTYPE,
  tarfile.SOLARIS_XHDTYPE,
  tarfile.GNUTYPE_LONGNAME,
  tarfile.GNUTYPE_LONGLINK,
  tarfile.GNUTYPE_SPARSE,
)
