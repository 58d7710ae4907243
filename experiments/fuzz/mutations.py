"""A small valid archive, and the ways in which it is made hostile.

Each mutation is a function of (rng, members) or of (rng, bytes), so that an
input can be made again from the numbers that seed its generator.
"""

import dataclasses
import gzip
import zlib
from collections.abc import Callable

import numpy as np

from resnet_flax.data import archive

# The official layout with two images in each of three files.
SPEC = archive.ArchiveSpec(
  url="https://example.org/small-binary.tar.gz",
  sha256="",
  folder="small-batches-bin",
  files={
    "train": ("data_batch_1.bin", "data_batch_2.bin"),
    "test": ("test_batch.bin",),
  },
  images_per_file={"train": 2, "test": 2},
  labels=("label",),
  label_names={"label": "batches.meta.txt"},
  num_names={"label": 10},
)

BLOCK = 512
# Of a tar header: offset and length.
FIELDS = {
  "name": (0, 100),
  "mode": (100, 8),
  "uid": (108, 8),
  "gid": (116, 8),
  "size": (124, 12),
  "mtime": (136, 12),
  "chksum": (148, 8),
  "typeflag": (156, 1),
  "linkname": (157, 100),
  "magic": (257, 8),
  "uname": (265, 32),
  "gname": (297, 32),
  "devmajor": (329, 8),
  "devminor": (337, 8),
  "prefix": (345, 155),
  # GNU's old sparse format: four (offset, size) pairs, more follow, real size.
  "sparse": (386, 96),
  "isextended": (482, 1),
  "realsize": (483, 12),
}


@dataclasses.dataclass
class Member:
  """A header without its checksum, and what follows it.

  Attributes:
    header: bytes[512].
    content: not padded.
    checksum: whether the header's is right.
  """

  header: bytearray
  content: bytes
  checksum: bool = True

  def set(self, field: str, value: bytes) -> None:
    """Overwrites a field of the header; what does not fit is cut off."""
    offset, length = FIELDS[field]
    self.header[offset : offset + length] = value[:length].ljust(length, b"\0")

  def to_bytes(self) -> bytes:
    """Header and content, padded to whole blocks."""
    header = bytearray(self.header)
    if self.checksum:
      offset, length = FIELDS["chksum"]
      header[offset : offset + length] = b" " * length
      header[offset : offset + length] = b"%06o\0 " % sum(header)
    return bytes(header) + self.content + bytes(-len(self.content) % BLOCK)


Rng = np.random.Generator


def member(name: bytes, content: bytes, typeflag: bytes = b"0") -> Member:
  """A plain member."""
  made = Member(bytearray(BLOCK), content)
  for field, value in {
    "name": name,
    "mode": b"0000644\0",
    "uid": b"0000000\0",
    "gid": b"0000000\0",
    "size": b"%011o\0" % len(content),
    "mtime": b"00000000000\0",
    "typeflag": typeflag,
    "magic": b"ustar\00000",
  }.items():
    made.set(field, value)
  return made


def intact() -> list[Member]:
  """The members of a valid archive, always the same."""
  rng = np.random.default_rng(0)
  folder = SPEC.folder.encode()
  members = [member(folder + b"/", b"", b"5")]
  for files in SPEC.files.values():
    for name in files:
      images = rng.integers(0, 256, (2, 1 + 3072), np.uint8)
      images[:, 0] = rng.integers(0, 10, 2)
      members.append(member(folder + b"/" + name.encode(), images.tobytes()))
  names = "".join(f"class_{label}\n" for label in range(10))
  members.append(member(folder + b"/batches.meta.txt", names.encode()))
  members.append(member(folder + b"/readme.html", b"<html></html>" * 40))
  return members


def to_tar(members: list[Member]) -> bytes:
  """A tar with its two final blocks of zeros."""
  return b"".join(each.to_bytes() for each in members) + bytes(2 * BLOCK)


def compress(tar: bytes) -> bytes:
  """As a gzip file, quickly."""
  return gzip.compress(tar, compresslevel=1, mtime=0)


def _pick(rng: Rng, choices):
  return choices[int(rng.integers(len(choices)))]


def _random_bytes(rng: Rng, most: int) -> bytes:
  return rng.bytes(int(rng.integers(most + 1)))


def _number(rng: Rng) -> bytes:
  """Twelve bytes where a number should be."""
  value = _pick(rng, [0, 1, 511, 512, 6145, 6146, 6147, 2**31, 2**33 - 1])
  return _pick(
    rng,
    [
      b"%011o\0" % value,
      b"%012o" % value,
      b"%11d " % value,
      # Base 256, as GNU writes what octal digits cannot hold.
      b"\x80" + value.to_bytes(11, "big"),
      b"\x80" + b"\xff" * 11,
      # Negative: -512 and others.
      b"\xff" * 10 + b"\xfe\x00",
      b"\xff" + (2**88 - value - 1).to_bytes(11, "big"),
      b"-0000001000\0",
      b"-1",
      b"0o7",
      b"1_000",
      b" " * 12,
      bytes(12),
      b"9" * 12,
      rng.bytes(12),
    ],
  )


def _name(rng: Rng) -> bytes:
  known = f"{SPEC.folder}/data_batch_1.bin".encode()
  return _pick(
    rng,
    [
      b"../" * 3 + b"escaped",
      b"/" + known,
      b"./" + known,
      known + b"/",
      known + b"\0hidden",
      known.upper(),
      known.replace(b"/", b"//"),
      known.replace(b"/", b"/../small-batches-bin/"),
      b"C:\\windows\\file",
      b"/dev/zero",
      b"",
      b"\0" * 100,
      b"a" * 100,
      b"\xff\xfe" * 20,
      "é\u202e\n".encode(),
      known,
      rng.bytes(100),
    ],
  )


def _edit_field(rng: Rng, members: list[Member]) -> None:
  edited = _pick(rng, members)
  field = _pick(rng, list(FIELDS))
  value = _number(rng) if rng.random() < 0.5 else rng.bytes(FIELDS[field][1])
  edited.set(field, value)
  edited.checksum = field != "chksum"


def _edit_size(rng: Rng, members: list[Member]) -> None:
  edited = _pick(rng, members)
  edited.set("size", _number(rng))
  if rng.random() < 0.3:
    edited.content = _random_bytes(rng, 4 * BLOCK)


def _edit_type(rng: Rng, members: list[Member]) -> None:
  edited = _pick(rng, members)
  kind = _pick(rng, [*b"\0001234567SLKNDMVXxg?", int(rng.integers(256))])
  edited.set("typeflag", bytes([kind]))
  edited.set("linkname", _name(rng))


def _edit_name(rng: Rng, members: list[Member]) -> None:
  edited = _pick(rng, members)
  edited.set(_pick(rng, ["name", "name", "prefix", "linkname"]), _name(rng))


def _rearrange(rng: Rng, members: list[Member]) -> None:
  chosen = int(rng.integers(len(members)))
  action = int(rng.integers(6))
  if action == 0:
    members.append(members[chosen])
  elif action == 1:
    members.pop(chosen)
  elif action == 2:
    order = rng.permutation(len(members))
    members[:] = [members[position] for position in order]
  elif action == 3:
    members.insert(chosen, member(_name(rng), _random_bytes(rng, 2 * BLOCK)))
  elif action == 4:
    # Some thousand headers, of nothing.
    count = int(rng.integers(1, 3000))
    members[chosen:chosen] = [member(_name(rng), b"")] * count
  else:
    other = int(rng.integers(len(members)))
    first, second = members[chosen], members[other]
    first.content, second.content = second.content, first.content


def _make_sparse(rng: Rng, members: list[Member]) -> None:
  edited = _pick(rng, members)
  edited.set("typeflag", b"S")
  edited.set("magic", b"ustar  \0")
  edited.set("sparse", b"".join(_number(rng) for _ in range(8)))
  edited.set("isextended", bytes([int(rng.integers(3))]))
  edited.set("realsize", _number(rng))
  if rng.random() < 0.5:
    extension = b"".join(_number(rng) for _ in range(42)) + b"\1"
    edited.content = extension.ljust(BLOCK, b"\0") + edited.content


def _pax_record(rng: Rng) -> bytes:
  key = _pick(
    rng,
    [
      *(b"size", b"path", b"linkpath", b"mtime", b"hdrcharset", b"charset"),
      *(b"GNU.sparse.major", b"GNU.sparse.minor", b"GNU.sparse.map"),
      *(b"GNU.sparse.size", b"GNU.sparse.realsize", b"GNU.sparse.numblocks"),
      *(b"GNU.sparse.name", b"GNU.sparse.offset", b"SCHILY.xattr.x"),
    ],
  )
  value = _pick(
    rng,
    [
      *(b"0", b"1", b"-1", b"-512", b"9" * 30, b"nan", b"1e400", b"BINARY"),
      *(b"0,1,2", b"1," * 500, _name(rng), _random_bytes(rng, 40)),
    ],
  )
  body = key + b"=" + value + b"\n"
  length = len(body) + 3
  stated = _pick(rng, [length, length, length, 0, -1, 1, 10**9, 10**30])
  return b"%d %b" % (stated, body)


def _add_pax(rng: Rng, members: list[Member]) -> None:
  records = [_pax_record(rng) for _ in range(int(rng.integers(1, 6)))]
  # Digits without an end are what a regular expression can take long over.
  content = _pick(
    rng,
    [b"".join(records), b"1" * int(rng.integers(50_000)), rng.bytes(600), b""],
  )
  header = member(b"pax_header", content, _pick(rng, [b"x", b"g", b"X"]))
  if rng.random() < 0.3:
    header.set("size", _number(rng))
  # A chain of them is read by recursion.
  count = _pick(rng, [1, 1, 1, 2, 1500]) if len(content) < BLOCK else 1
  at = int(rng.integers(len(members) + 1))
  members[at:at] = [header] * count


def _add_long_name(rng: Rng, members: list[Member]) -> None:
  content = _name(rng) * int(rng.integers(1, 200))
  header = member(b"././@LongLink", content, _pick(rng, [b"L", b"K"]))
  if rng.random() < 0.5:
    header.set("size", _number(rng))
  members.insert(int(rng.integers(len(members) + 1)), header)


def _edit_content(rng: Rng, members: list[Member]) -> None:
  edited = _pick(rng, members)
  content = bytearray(edited.content)
  action = int(rng.integers(4))
  if action == 0 and content:
    # A label, if it is an image file.
    content[_pick(rng, [0, 3073]) % len(content)] = int(rng.integers(256))
  elif action == 1 and content:
    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
  elif action == 2:
    content = bytearray(_random_bytes(rng, 2 * len(content) + 2))
  else:
    words = [b"class_0", b"\xff", b"\0", b"\x1b[2J", "é".encode(), b"a b"]
    count = int(rng.integers(20))
    content = bytearray(b"\n".join(_pick(rng, words) for _ in range(count)))
  edited.content = bytes(content)
  edited.set("size", b"%011o\0" % len(content))


def _damage(rng: Rng, raw: bytes) -> bytes:
  """A few edits anywhere."""
  damaged = bytearray(raw)
  for _ in range(int(rng.integers(1, 5))):
    at = int(rng.integers(len(damaged) + 1))
    action = int(rng.integers(5))
    if action == 0 and at < len(damaged):
      damaged[at] ^= 1 << int(rng.integers(8))
    elif action == 1:
      damaged[at : at + 4] = rng.bytes(4)
    elif action == 2:
      damaged[at:at] = _random_bytes(rng, 600)
    elif action == 3:
      del damaged[at : at + int(rng.integers(1, 600))]
    else:
      length = int(rng.integers(1, 600))
      source = int(rng.integers(len(damaged) + 1))
      damaged[at : at + length] = damaged[source : source + length]
  return bytes(damaged)


def _truncate(rng: Rng, raw: bytes) -> bytes:
  return raw[: int(rng.integers(len(raw)))]


def _damage_gzip(rng: Rng, raw: bytes) -> bytes:
  """What only somebody who knows the format would do."""
  action = int(rng.integers(8))
  if action == 0:
    # The checksum or the length, at the end.
    return raw[:-8] + rng.bytes(8)
  if action == 1:
    return raw + _pick(rng, [raw, rng.bytes(20), bytes(1000)])
  if action == 2:
    # Flags announce names, comments and an extra field that are not there.
    return raw[:3] + rng.bytes(1) + raw[4:]
  if action == 3:
    return compress(raw)
  if action == 4:
    # 20 bytes each, which hold nothing.
    return compress(b"") * int(rng.integers(1, 2000)) + raw
  if action == 5:
    # More than a reader should put up with, from a thousandth of it.
    bomb = zlib.compressobj(9, wbits=31)
    megabytes = _pick(rng, [1, 8, 24])
    head = zlib.decompress(raw, wbits=31)[: -2 * BLOCK]
    size = b"%011o\0" % (megabytes << 20)
    filler = member(b"filler", b"")
    filler.set("size", size)
    zeros = bytes(1 << 20)
    parts = [bomb.compress(head + filler.to_bytes())]
    parts += [bomb.compress(zeros) for _ in range(megabytes)]
    return b"".join(parts) + bomb.flush()
  if action == 6:
    return zlib.decompress(raw, wbits=31)
  return raw[:10] + _damage(rng, raw[10:200]) + raw[200:]


_OF_MEMBERS: dict[str, Callable[[Rng, list[Member]], None]] = {
  "header field": _edit_field,
  "size": _edit_size,
  "type": _edit_type,
  "name": _edit_name,
  "members": _rearrange,
  "sparse": _make_sparse,
  "pax": _add_pax,
  "long name": _add_long_name,
  "content": _edit_content,
}
_OF_TAR: dict[str, Callable[[Rng, bytes], bytes]] = {
  "tar bytes": _damage,
  "tar cut short": _truncate,
}
_OF_GZIP: dict[str, Callable[[Rng, bytes], bytes]] = {
  "gzip": _damage_gzip,
  "file bytes": _damage,
  "file cut short": _truncate,
}
KINDS = (*_OF_MEMBERS, *_OF_TAR, *_OF_GZIP, "several")


def make(seed: int, index: int) -> tuple[str, bytes]:
  """One input.

  Args:
    seed: of the run.
    index: of the input; kinds take turns.

  Returns:
    Its kind, one of `KINDS`, and the bytes of the file.
  """
  rng = np.random.default_rng([seed, index])
  kind = KINDS[index % len(KINDS)]
  kinds = [kind]
  if kind == "several":
    kinds = [_pick(rng, KINDS[:-1]) for _ in range(int(rng.integers(2, 6)))]
  members = intact()
  for each in kinds:
    if each in _OF_MEMBERS and members:
      _OF_MEMBERS[each](rng, members)
  tar = to_tar(members)
  for each in kinds:
    if each in _OF_TAR:
      tar = _OF_TAR[each](rng, tar)
  raw = compress(tar)
  for each in kinds:
    if each in _OF_GZIP and raw[:2] == b"\x1f\x8b":
      try:
        raw = _OF_GZIP[each](rng, raw)
      except zlib.error:
        continue  # Damaged already, so that it cannot be taken apart.
  return kind, raw
