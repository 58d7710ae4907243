import dataclasses
import gc
import gzip
import http.server
import os
import pathlib
import socket
import tarfile
import tempfile
import threading
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from experiments.fuzz import mutations, reading
from resnet_flax.data import archive, cifar
from resnet_flax.run import errors
from tests.data import archives


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(autouse=True)
def _collect_sockets():
  """Pooch leaves a failed response to the garbage collector."""
  yield
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)
    gc.collect()


@pytest.fixture(params=["cifar10", "cifar100"])
def small(request, monkeypatch, tmp_path):
  """The spec of a small archive, its path, images and labels."""
  path = tmp_path / f"{request.param}-binary.tar.gz"
  images, labels = archives.install(monkeypatch, request.param, path)
  return cifar.ARCHIVES[request.param], path, images, labels


def test_read(small):
  spec, path, images, labels = small
  archive.verify(spec, path)
  contents = archive.read(spec, path)
  for split in ("train", "test"):
    np.testing.assert_array_equal(contents.images[split], images[split])
    # The last label byte is the fine one.
    np.testing.assert_array_equal(contents.labels[split][:, -1], labels[split])
  assert contents.names["label"][3] == "class_3"


def test_a_changed_byte_is_noticed(small):
  spec, path, _, _ = small
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(raw)
  with pytest.raises(errors.DataError, match="is not the official archive"):
    archive.verify(spec, path)


def test_missing_file():
  spec = cifar.ARCHIVES["cifar10"]
  with pytest.raises(errors.DataError, match="No such file"):
    archive.verify(spec, cifar.pathlib.Path("no-such-file.tar.gz"))


def broken(spec, path, change):
  members, _, _ = archives.contents(spec, 10)
  change(members)
  archives.write(path, members)
  return path


def test_a_missing_member(small):
  spec, path, _, _ = small
  name = f"{spec.folder}/{spec.files['test'][0]}"
  broken(spec, path, lambda members: members.pop(name))
  with pytest.raises(errors.DataError, match=f"lacks {name}"):
    archive.read(spec, path)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"x"])
def test_a_member_of_the_wrong_size(small, change):
  spec, path, _, _ = small
  name = f"{spec.folder}/{spec.files['train'][0]}"
  broken(
    spec, path, lambda members: members.update({name: change(members[name])})
  )
  with pytest.raises(errors.DataError, match="needed: a file of"):
    archive.read(spec, path)


def test_a_link_is_not_followed(small, tmp_path):
  spec, path, _, _ = small
  secret = tmp_path / "secret"
  secret.write_bytes(b"x")
  with tarfile.open(path, "w:gz") as tar:
    link = tarfile.TarInfo(f"{spec.folder}/{spec.files['test'][0]}")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    tar.addfile(link)
  with pytest.raises(errors.DataError, match=r"no plain file.*a file of"):
    archive.read(spec, path)


def test_other_members_are_left_alone(small, tmp_path):
  spec, path, _, _ = small
  members, _, _ = archives.contents(spec, spec.num_names["label"])
  members["../escaped"] = b"x"
  members["/absolute"] = b"x"
  archives.write(path, members)
  archive.read(spec, path)
  assert not (tmp_path.parent / "escaped").exists()


@pytest.mark.parametrize("cut", [0, 10, 1000, -1])
def test_a_short_archive(small, cut):
  spec, path, _, _ = small
  path.write_bytes(path.read_bytes()[:cut])
  with pytest.raises(errors.DataError, match=r"cannot be read as"):
    archive.read(spec, path)


# The archives from here on are those of the fuzzer: small, and made block by
# block, since tarfile would not write them.
FIRST = 1  # Position of the first image file.
TEXT = 4


@pytest.fixture
def hostile(tmp_path):
  """A function that reads an archive of the given members."""

  def read(members):
    path = tmp_path / "hostile\nname é.tar.gz"
    path.write_bytes(mutations.compress(mutations.to_tar(members)))
    with pytest.raises(errors.DataError) as caught:
      archive.read(mutations.SPEC, path)
    message = str(caught.value)
    assert "\n" not in message
    assert "hostile\\nname é.tar.gz" in message
    return message

  return read


@pytest.mark.parametrize(
  "kind", ["1", "2", "3", "4", "5", "6", "S", "x", "g", "L", "K", "?"]
)
def test_only_plain_files_are_read(hostile, kind):
  members = mutations.intact()
  members[FIRST].set("typeflag", kind.encode())
  members[FIRST].set("linkname", b"/dev/zero")
  message = hostile(members)
  assert "data_batch_1.bin is no plain file" in message


@pytest.mark.parametrize(
  "size",
  [
    b"\xff" * 10 + b"\xfe\0",  # -512: back to the same header, for ever.
    b"\xff" * 12,
    b"\x80" + b"\xff" * 11,
    b"77777777777\0",
    b"-0000001000\0",
  ],
)
@pytest.mark.parametrize("position", [FIRST, 5])
def test_size_that_cannot_be(hostile, size, position):
  members = mutations.intact()
  members[position].set("size", size)
  hostile(members)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\x7f" * 11])
def test_extension_that_claims_any_size(hostile, kind, size):
  header = mutations.member(b"pax_header", b"", kind)
  header.set("size", size)
  assert "beyond the end" in hostile([header, *mutations.intact()])


@pytest.mark.parametrize(
  "content", [b"1" * 60_000, b"-1 path=x\n", b"20 size=999999999999\n"]
)
def test_extensions_are_not_parsed(tmp_path, content):
  path = tmp_path / "archive.tar.gz"
  extensions = [mutations.member(b"x", content, b"x")] * 200
  tar = mutations.to_tar([*extensions, *mutations.intact()])
  path.write_bytes(mutations.compress(tar))
  expected = reading.intact_contents(tmp_path)
  assert reading.judge(path, expected) == ("same", "")


def test_sparse_file_of_any_size(hostile):
  members = mutations.intact()
  members[FIRST].set("typeflag", b"S")
  members[FIRST].set("sparse", b"77777777777\00000000001\0")
  members[FIRST].set("realsize", b"77777777777\0")
  assert "needed: a file of 6146" in hostile(members)


def test_a_member_twice(hostile):
  members = mutations.intact()
  members.append(members[FIRST])
  assert "data_batch_1.bin twice" in hostile(members)


def test_too_many_members(hostile):
  members = [mutations.member(b"x", b"")] * 2000
  assert "more than 1000 members" in hostile(members + mutations.intact())


def test_names_outside_the_folder_are_other_names(hostile):
  members = mutations.intact()
  name = f"{mutations.SPEC.folder}/data_batch_1.bin"
  for hostile_name in (f"../{name}", f"/{name}", f"x/../{name}"):
    members[FIRST].set("name", hostile_name.encode())
    assert f"lacks {name}" in hostile(members)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"\xff\xfe", "is not UTF-8"),
    (b"a b c", "has 3 names, 3 of them different; needed: 10"),
    (b"a " * 10, "has 10 names, 1 of them different"),
    (b"x" * 70_000, "at most 65536"),
    (b"", "has 0 names"),
  ],
)
def test_wrong_names(hostile, content, message):
  members = mutations.intact()
  members[TEXT] = mutations.member(
    f"{mutations.SPEC.folder}/batches.meta.txt".encode(), content
  )
  assert message in hostile(members)


def test_label_without_a_name(hostile):
  members = mutations.intact()
  members[FIRST].content = b"\x0a" + members[FIRST].content[1:]
  assert "the train split has a label of 10; needed: 0 to 9" in hostile(members)


def test_bomb(tmp_path):
  path = tmp_path / "bomb.tar.gz"
  with gzip.open(path, "wb", compresslevel=1) as file:
    filler = mutations.member(b"filler", b"")
    filler.set("size", b"%011o\0" % (1 << 32))
    file.write(filler.to_bytes())
    for _ in range(64):
      file.write(bytes(1 << 20))
  with pytest.raises(errors.DataError, match="more than the official archive"):
    archive.read(mutations.SPEC, path)


def test_wrong_gzip_checksum(small):
  spec, path, _, _ = small
  raw = bytearray(path.read_bytes())
  raw[-8] ^= 1
  path.write_bytes(raw)
  with pytest.raises(errors.DataError, match="incorrect data check"):
    archive.read(spec, path)


def make_folder(path):
  path.mkdir()


def make_endless(path):
  path.symlink_to("/dev/zero")


def make_empty(path):
  path.write_bytes(b"")


def make_circle(path):
  path.symlink_to(path)


def make_gigantic(path):
  with path.open("wb") as file:
    file.truncate(1 << 40)  # Takes no space, but hours to read.


@pytest.mark.parametrize(
  "make", [make_folder, os.mkfifo, make_endless, make_empty, make_circle]
)
def test_path_that_is_no_archive(tmp_path, make):
  path = tmp_path / "archive"
  make(path)
  for use in (archive.verify, archive.read):
    with pytest.raises(errors.DataError, match=str(path)):
      use(cifar.ARCHIVES["cifar10"], path)


def test_gigantic_file_is_not_even_hashed(tmp_path):
  path = tmp_path / "archive"
  make_gigantic(path)
  with pytest.raises(errors.DataError, match="has 1099511627776 bytes"):
    archive.verify(cifar.ARCHIVES["cifar10"], path)


def test_file_that_may_not_be_read(small, monkeypatch):
  spec, path, _, _ = small

  def refuse(*_):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(pathlib.Path, "open", refuse)
  for use in (archive.verify, archive.read):
    with pytest.raises(errors.DataError, match="Permission denied"):
      use(spec, path)


EDITS = st.lists(
  st.tuples(st.integers(0, 25_000), st.binary(max_size=12)), max_size=4
)


def edit(raw, edits, cut):
  raw = bytearray(raw)
  for position, value in edits:
    position %= max(len(raw), 1)
    raw[position : position + len(value)] = value
  return bytes(raw[:cut])


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
  fields=st.lists(
    st.tuples(
      st.integers(0, 5),
      st.sampled_from(sorted(mutations.FIELDS)),
      st.binary(max_size=24) | st.from_regex(rb"[ 0-7]{0,12}", fullmatch=True),
    ),
    max_size=3,
  ),
  tar_edits=EDITS,
  tar_cut=st.none() | st.integers(0, 25_000),
  file_edits=st.just([]) | EDITS,
  file_cut=st.none() | st.integers(0, 25_000),
)
def test_any_archive_is_read_or_refused(
  fields, tar_edits, tar_cut, file_edits, file_cut
):
  members = mutations.intact()
  for position, field, value in fields:
    members[position].set(field, value)
  tar = edit(mutations.to_tar(members), tar_edits, tar_cut)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "archive.tar.gz"
    path.write_bytes(edit(mutations.compress(tar), file_edits, file_cut))
    expected = reading.intact_contents(path.parent)
    outcome, reason = reading.judge(path, expected)
  assert outcome != "finding", reason


def test_fetch(small, server, tmp_path):
  spec, path, _, _ = small
  folder, url = server
  (folder / path.name).write_bytes(path.read_bytes())
  spec = dataclasses.replace(spec, url=f"{url}/{path.name}")
  target = tmp_path / "data"
  fetched = archive.fetch(spec, target)
  assert fetched.read_bytes() == path.read_bytes()
  # What is there already is not fetched again.
  (folder / path.name).unlink()
  assert archive.fetch(spec, target) == fetched


def test_fetch_of_a_wrong_file_leaves_nothing(small, server, tmp_path):
  spec, path, _, _ = small
  folder, url = server
  (folder / path.name).write_bytes(b"not the archive")
  spec = dataclasses.replace(spec, url=f"{url}/{path.name}")
  target = tmp_path / "data"
  with pytest.raises(errors.DataError, match=r"dataset\.archive=FILE"):
    archive.fetch(spec, target)
  assert list(target.iterdir()) == []


class Endless(http.server.BaseHTTPRequestHandler):
  """Answers with zeros until the other side has enough."""

  def do_GET(self):
    self.send_response(200)
    self.end_headers()
    try:
      while True:
        self.wfile.write(bytes(1 << 20))
    except OSError:
      self.close_connection = True

  def log_message(self, *_):
    pass


def test_fetch_from_a_server_without_end(small, tmp_path):
  spec, _, _, _ = small
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as httpd:
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_address[1]}/archive.tar.gz"
    target = tmp_path / "data"
    with pytest.raises(errors.DataError, match="sends more than the official"):
      archive.fetch(dataclasses.replace(spec, url=url), target)
    gc.collect()  # Closes the response.
    httpd.shutdown()
  assert list(target.iterdir()) == []


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_fetch_to_what_is_no_file(small, tmp_path, make):
  spec, _, _, _ = small
  (tmp_path / "data").mkdir()
  make(tmp_path / "data" / spec.url.rsplit("/", 1)[-1])
  with pytest.raises(errors.DataError, match="is no file"):
    archive.fetch(spec, tmp_path / "data")


def test_fetch_names_the_ways_out(small, server, tmp_path):
  spec, _, _, _ = small
  _, url = server
  spec = dataclasses.replace(spec, url=f"{url}/missing.tar.gz")
  with pytest.raises(errors.DataError) as caught:
    archive.fetch(spec, tmp_path / "data")
  message = str(caught.value)
  for way in ("dataset.archive", "TFDS_DATA_DIR", "configs/quickstart.py"):
    assert way in message
  assert "\n" not in message


def test_fetch_without_network(small, tmp_path):
  spec, _, _, _ = small
  with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    port = unused.getsockname()[1]
  spec = dataclasses.replace(spec, url=f"http://127.0.0.1:{port}/a.tar.gz")
  with pytest.raises(errors.DataError, match="ConnectionError"):
    archive.fetch(spec, tmp_path / "data")


def test_fetch_gives_up_on_a_silent_server(small, monkeypatch, tmp_path):
  spec, _, _, _ = small
  monkeypatch.setattr(archive, "_TIMEOUT", 0.3)
  with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    port = silent.getsockname()[1]
    spec = dataclasses.replace(spec, url=f"http://127.0.0.1:{port}/a.tar.gz")
    started = time.monotonic()
    with pytest.raises(errors.DataError, match="Timeout"):
      archive.fetch(spec, tmp_path / "data")
    # Not a benchmark: without the limit the test would hang.
    assert time.monotonic() - started < 60
