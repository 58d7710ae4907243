"""A mirror: a copy of a workdir that outlives its machine.

It is in a bucket or on another disk. Its states are always complete: a file is
stored under its SHA-256 and never changed, and a state is a list of files,
written after the files. The latest two states are kept.
"""

import atexit
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
import re
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import fsspec

from resnet_flax.run import checkpoint, errors, files

_logger = logging.getLogger(__name__)

# Copied in this order and before the checkpoints, which the records need;
# `fill` writes in the reverse order.
_FILES = ("config.json", "environment.json", "metrics.jsonl")
_KEPT_STATES = 2
# All in seconds.
_POLL, _MOST_PATIENCE = 1.0, 60.0  # Pauses: the usual, the longest on failure.
_ANSWER, _TRANSFER = 60.0, 1800.0  # Limits for a request, for a file's copy.
_FRESH = 120.0  # An owner that is silent for longer counts as ended.
_AT_THE_END, _WHEN_STOPPED = 600.0, 30.0  # Limits for copying the last state.

_TRIES = 5  # To read a mirror while its run still writes it.
# Read errors that do not mean that a file is damaged.
_TRANSIENT = (
  *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ESTALE),
  *(errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN),
)

_KEY = "checkpoint.mirror"


@dataclasses.dataclass(frozen=True)
class _State:
  """A complete state of a workdir."""

  number: int  # States are numbered from 1.
  progress: list[int]  # See `progress`.
  files: dict[str, str]  # SHA-256 by path in the workdir.


class _Store:
  def __init__(self, url: str, name: str = _KEY):
    self.url, self.name = url, name
    options = {"use_listings_cache": False, "skip_instance_cache": True}
    try:
      if errors.is_local(url):  # A '::' or 'file:' is a part of a name there.
        # Files need their folders.
        self.system = fsspec.filesystem("file", auto_mkdir=True, **options)
        self.root = os.path.abspath(os.path.expanduser(url))
      else:
        self.system, self.root = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
      raise errors.ConfigError(
        f"{name}={url} cannot be used: {errors.one_line(error)}."
        " gs:// needs pip install 'resnet_flax[gcs]', s3:// 'resnet_flax[s3]'."
      ) from error
    # gcsfs also logs tracebacks of errors that it raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

  def _call(self, seconds: float, method: str, *arguments: Any) -> Any:
    """Calls a method of the file system with a time limit: it may hang."""
    answer: futures.Future[Any] = futures.Future()

    def call() -> None:
      try:
        answer.set_result(getattr(self.system, method)(*arguments))
      except BaseException as error:
        answer.set_exception(error)

    # Not a pool: the interpreter would wait for its threads to end.
    threading.Thread(target=call, daemon=True).start()
    if not futures.wait([answer], seconds).done:
      raise TimeoutError(f"no answer for {seconds:g} s")
    return answer.result()

  def names(self, folder: str) -> set[str]:
    try:
      self.system.invalidate_cache()
      paths = self._call(_ANSWER, "ls", f"{self.root}/{folder}", False)
    except FileNotFoundError:
      return set()
    return {path.rstrip("/").rpartition("/")[2] for path in paths} - {folder}

  def read(self, name: str) -> bytes | None:
    """A file's content; None if it is missing."""
    try:
      return self._call(_ANSWER, "cat_file", f"{self.root}/{name}")
    except FileNotFoundError:
      return None

  def write(self, name: str, content: bytes) -> None:
    self._call(_ANSWER, "pipe_file", f"{self.root}/{name}", content)

  def remove(self, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
      self._call(_ANSWER, "rm_file", f"{self.root}/{name}")

  def upload(self, path: pathlib.Path, name: str) -> None:
    self._call(_TRANSFER, "put_file", str(path), f"{self.root}/{name}")

  def download(self, name: str, path: pathlib.Path) -> None:
    self._call(_TRANSFER, "get_file", f"{self.root}/{name}", str(path))

  def states(self) -> list[_State]:
    """The states whose lists are complete, the latest first."""
    complete = []
    for name in sorted(self.names("states"), reverse=True):
      content = self.read(f"states/{name}") or b""
      # A half-written list does not match the digest in its name.
      if name[9:] == _state_name(0, content)[9:]:
        complete.append(_State(**json.loads(content)))
    return complete


def _state_name(number: int, content: bytes) -> str:
  return f"{number:09}-{hashlib.sha256(content).hexdigest()[:16]}.json"


def _digests(states: list[_State]) -> set[str]:
  return {digest for state in states for digest in state.files.values()}


class Mirror:
  """Keeps the mirror of a workdir up to date while entered.

  Entering refuses an address that another run uses, and fills a workdir that is
  behind its mirror. Then a thread copies complete files; training waits for it
  only at the end. `check` gets a folder with the mirrored configuration, and
  must raise an error if it is another run's. `is_taken` says whether another
  run has taken over the workdir.
  """

  def __init__(
    self,
    url: str,
    workdir: pathlib.Path,
    check: Callable[[pathlib.Path], None] = lambda folder: None,
    is_taken: Callable[[], bool] = lambda: False,
  ):
    self._workdir, self._check, self._is_taken = workdir, check, is_taken
    self._store = _Store(url)
    self._owner = {
      "run": uuid.uuid4().hex,
      "host": socket.gethostname(),
      "pid": os.getpid(),
    }
    # Digests of the mirror's complete files; of its latest state's, by path.
    self._stored: set[str] = set()
    self._latest: dict[str, str] = {}
    self._damaged: set[int] = set()  # Steps that warnings have named.
    self._pushed: dict[str, Any] | None = None  # `_look` at the last copy.
    self._number = 0  # The highest number so far.
    self._beaten = 0.0  # When owner.json was written, by the monotonic clock.
    self._closing = threading.Event()
    self._abandoned = False
    self._thread = threading.Thread(target=self._run, daemon=True)

  def __enter__(self) -> "Mirror":
    with _explain(self._store.url):
      self._claim()
      try:
        self._fill_or_check()
      except BaseException:
        # A run that fails to start must not block the address.
        with contextlib.suppress(Exception):
          self._release()
        raise
    self._thread.start()
    return self

  def __exit__(self, kind: Any, *exception: object) -> None:
    seconds = _AT_THE_END if kind is None else _WHEN_STOPPED
    self._closing.set()
    self._thread.join(seconds)
    if self._thread.is_alive():
      self._abandoned = True
      _logger.warning(
        "warning: %s lacks the latest files; they are only in %s",
        self._store.url,
        self._workdir,
      )

  def _fill_or_check(self) -> None:
    """Fills a workdir that is behind; refuses an address of another run."""
    states, names = self._store.states(), self._store.names("states")
    # Torn lists count, too: `_remove_old` removes the lowest numbers first.
    numbers = (int(name[:9]) for name in names if name[:9].isdecimal())
    self._number = max(numbers, default=0)
    current = progress(self._workdir)
    # One torn list is no damage: a run was killed as it wrote its first list.
    is_torn = not states and len(names) > 1
    is_new = current in ([-1, 0], [0, 0])  # At most a checkpoint of step 0.
    # `fill` writes config.json last: without it a workdir is incomplete.
    is_filled = (self._workdir / "config.json").exists()
    mirrored = states[0].progress if states else []
    is_behind = mirrored > current or (mirrored == current and not is_filled)
    if is_behind or (is_torn and is_new):
      states = [fill(self._store, states, self._workdir, self._check)]
      _logger.info("filled %s from %s", self._workdir, self._store.url)
    else:
      self._check_run(states)
    # All other files are uploaded again: a file that no complete state lists
    # may be torn, and a listed file may be missing.
    self._stored = _digests(states) & self._store.names("files")
    self._latest = states[0].files if states else {}

  def _check_run(self, states: list[_State]) -> None:
    """Refuses another run's mirror, whose states would be replaced."""
    for state in states:
      digests = {k: v for k, v in state.files.items() if k in _FILES}
      with files.temporary_folder(self._workdir, ".mirror-") as folder:
        if _download(self._store, digests, folder):
          return self._check(folder)

  # ---- The owner of the address

  def _claim(self) -> None:
    owner = self._read_owner()
    age = time.time() - owner.get("time", 0)
    # Hosts' clocks differ; a time far ahead comes from a wrong clock.
    if abs(age) < _FRESH and not _has_ended(owner):
      raise errors.WorkdirError(
        f"checkpoint.mirror={self._store.url} is in use by process"
        f" {owner['pid']} on {owner['host']}, last heard of {max(age, 0):.0f} s"
        f" ago. Stop it; if it has ended, wait {_FRESH - age:.0f} s, or pass"
        " another address."
      )
    self._beat()

  def _read_owner(self) -> dict[str, Any]:
    """The content of owner.json; {} if it is missing or half-written."""
    try:
      return files.parse_object(self._store.read("owner.json") or b"{}")
    except ValueError:
      return {}

  def _release(self) -> None:
    """Lets others use the address, unless another run has taken over."""
    if self._read_owner().get("run") == self._owner["run"]:
      self._store.remove("owner.json")

  def _beat(self) -> None:
    owner = self._owner | {"time": time.time()}
    self._store.write("owner.json", json.dumps(owner).encode())
    self._beaten = time.monotonic()

  def _keep_ownership(self) -> bool:
    """Renews ownership when it is due; False if another run has taken over."""
    if self._abandoned:
      return False
    own_run = self._owner["run"]
    if self._is_taken():
      reason = f"another run may now use {self._workdir}"
    elif time.monotonic() - self._beaten <= _FRESH / 6:
      return True
    elif self._read_owner().get("run", own_run) == own_run:
      self._beat()
      return True
    else:
      reason = f"another run has taken over {self._store.url}"
    self._abandoned = True
    _logger.warning(
      "warning: %s; nothing more is copied to %s", reason, self._store.url
    )
    with contextlib.suppress(Exception):  # The claim expires anyway.
      self._release()
    return False

  # ---- The thread

  def _run(self) -> None:
    patience, is_failing = _POLL, False
    while not self._abandoned:
      closing = self._closing.wait(patience)
      patience = min(2 * patience, _MOST_PATIENCE)
      try:
        if self._push():
          if is_failing:
            _logger.info("%s is up to date again", self._store.url)
          patience, is_failing = _POLL, False
          if closing:
            return self._release()
      # Libraries raise many exceptions; the local files are good in any case.
      except Exception as error:
        if not is_failing:
          _logger.warning(
            "warning: %s cannot be written (%s); trying again",
            self._store.url,
            errors.one_line(error),
          )
        is_failing = True
      if closing:
        time.sleep(_POLL)

  def _push(self) -> bool:
    """Copies the workdir's state if it is new; returns whether it is stored."""
    seen = self._look()
    if not self._keep_ownership():
      return False
    # A workdir without its configuration holds nothing yet.
    if seen == self._pushed or "config.json" not in seen:
      return True
    with files.temporary_folder(self._workdir, ".mirror-") as folder:
      # Links, since the run may remove checkpoints during a slow upload.
      with contextlib.suppress(FileNotFoundError):
        for name in seen:
          _link(self._workdir / name, folder / name)
      if self._look() != seen or not self._keep_ownership():
        return False
      # Counted first: where the workdir is removed meanwhile, a digest fails.
      _, records = progress(folder)
      digests = self._digests_in(folder, seen)
      copied = (int(n.split("/")[1]) for n in digests if n not in _FILES)
      state_progress = [max(copied, default=-1), records]
      state = _State(self._number + 1, state_progress, digests)
      for name, digest in digests.items():
        if digest not in self._stored and self._keep_ownership():
          self._store.upload(folder / name, f"files/{digest}")
          self._stored.add(digest)
    if not self._keep_ownership():
      return False
    content = json.dumps(dataclasses.asdict(state)).encode()
    self._store.write(f"states/{_state_name(state.number, content)}", content)
    self._number, self._pushed, self._latest = state.number, seen, digests
    self._remove_old()
    return self._pushed is not None

  def _digests_in(
    self, folder: pathlib.Path, seen: dict[str, tuple[int, int]]
  ) -> dict[str, str]:
    """The SHA-256 of a state's files, by path.

    Of a damaged checkpoint, the copy in the mirror's latest state is listed, or
    nothing if the mirror has no good copy.
    """
    digests = {n: files.digest_of(folder / n) for n in seen if n in _FILES}
    before = self._pushed or {}
    for step in checkpoint.steps(folder):
      subfolder = f"checkpoints/{step}/"
      names = [name for name in seen if name.startswith(subfolder)]
      copy = {k: v for k, v in self._latest.items() if k.startswith(subfolder)}
      if not self._stored.issuperset(copy.values()):
        copy = {}
      if not copy or any(seen[n] != before.get(n) for n in names):
        try:
          checked = checkpoint.file_digests(folder, step)
          copy = {
            name: checked.get(name.removeprefix(subfolder))
            or files.digest_of(folder / name)
            for name in names
          }
        except errors.WorkdirError as error:
          if getattr(error.__cause__, "errno", None) in _TRANSIENT:
            raise
          if step not in self._damaged:
            reason = str(error).replace(str(folder), str(self._workdir))
            _logger.warning("warning: not copied to the mirror: %s", reason)
            self._damaged.add(step)
      digests |= copy
    return digests

  def _look(self) -> dict[str, tuple[int, int]]:
    """The workdir's complete files, by path; time and size show changes."""
    paths = [self._workdir / name for name in _FILES]
    for step in checkpoint.steps(self._workdir):
      paths += sorted((self._workdir / "checkpoints" / str(step)).rglob("*"))
    try:
      return {
        str(path.relative_to(self._workdir)): (stat.st_mtime_ns, stat.st_size)
        for path in paths
        if path.is_file()
        for stat in [path.stat()]
      }
    except FileNotFoundError:  # The run is removing a checkpoint.
      return self._look()

  def _remove_old(self) -> None:
    used = _digests(self._store.states()[:_KEPT_STATES])
    present = self._store.names("files")
    self._stored &= used & present
    if not self._stored.issuperset(self._latest.values()):
      # Files were removed: uploads them again, unless a new owner did it.
      self._pushed, self._beaten = None, -math.inf
    for name in sorted(self._store.names("states"))[:-_KEPT_STATES]:
      self._store.remove(f"states/{name}")
    for digest in present - used:
      self._store.remove(f"files/{digest}")


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
  """Keeps a file's content under another path: as a hard link or a copy."""
  target.parent.mkdir(parents=True, exist_ok=True)
  with contextlib.suppress(OSError):  # Not all file systems have hard links.
    if source.name not in _FILES:  # The run appends to metrics.jsonl.
      return target.hardlink_to(source)
  shutil.copyfile(source, target)


def _has_ended(owner: dict[str, Any]) -> bool:
  """Whether the owner was a process of this machine that has ended."""
  if owner["host"] != socket.gethostname():
    return False
  try:
    os.kill(owner["pid"], 0)
  except OSError as error:  # It may be another user's process.
    return isinstance(error, ProcessLookupError)
  return owner["pid"] == os.getpid()  # This run has claimed nothing yet.


@contextlib.contextmanager
def _explain(url: str, name: str = _KEY) -> Iterator[None]:
  try:
    yield
  except errors.UserError:
    raise
  # Each kind of address raises different exceptions.
  except Exception as error:
    raise errors.WorkdirError(
      f"{name}={url} cannot be used: {errors.one_line(error)}. Check that"
      " this machine can reach it and may use it, or pass another address."
    ) from error


# ---- Workdirs


def progress(workdir: pathlib.Path) -> list[int]:
  """A workdir's progress: [step of the latest checkpoint, number of records].

  The step is -1 without a checkpoint. A later state of a run compares greater.
  """
  log = workdir / "metrics.jsonl"
  records = log.read_bytes().count(b"\n") if log.exists() else 0
  return [max(checkpoint.steps(workdir), default=-1), records]


def fill(
  store: _Store,
  states: list[_State],
  workdir: pathlib.Path,
  check: Callable[[pathlib.Path], None] = lambda folder: None,
) -> _State:
  """Fills a workdir with the latest undamaged state, and returns this state.

  Files are replaced one by one; checkpoints of the workdir are kept. If the
  download or `check` fails, nothing is changed.
  """
  for state in states:
    with files.temporary_folder(workdir, ".mirror-") as folder:
      if _download(store, state.files, folder):
        check(folder)
        (workdir / "checkpoints").mkdir(exist_ok=True)
        for step in map(str, checkpoint.steps(folder)):
          target = workdir / "checkpoints" / step
          if not target.exists():
            (folder / "checkpoints" / step).rename(target)
        for name in reversed(_FILES):
          if (folder / name).exists():
            (folder / name).replace(workdir / name)
        return state
    _logger.warning(
      "warning: state %d of %s is damaged", state.number, store.url
    )
  advice = ", or delete this one to start anew" * (store.name == _KEY)
  raise errors.WorkdirError(
    f"{store.name}={store.url} holds no undamaged state. Pass another"
    f" address{advice}."
  )


def _download(
  store: _Store, digests: dict[str, str], folder: pathlib.Path
) -> bool:
  """Downloads a state's files; returns whether all are undamaged."""
  for name, digest in digests.items():
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
      return False
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      store.download(f"files/{digest}", path)
    except FileNotFoundError:
      return False
    if files.digest_of(path) != digest:
      return False
  return True


def local(workdir: str | os.PathLike[str], name: str) -> pathlib.Path:
  """The folder to read a run from: a copy if `workdir` is a mirror's address.

  The copy is of the latest state and lasts as long as this process. `name` is
  the flag or key that gives `workdir`.
  """
  address = os.fspath(workdir)
  if not re.match(r"(gs|s3)://", address):
    path = errors.local_path(workdir, name)
    # Not Path.is_dir, which raises for names that are too long and the like.
    if not all(os.path.isdir(path / each) for each in ("states", "files")):
      return path
    address = str(path)
  with _explain(address, name):
    states = frozenset(_Store(address, name).names("states"))
  return _copy_of(address, name, states)


@functools.cache
def _copy_of(url: str, name: str, states: frozenset[str]) -> pathlib.Path:
  del states  # In the cache's key, so that a later state is copied again.
  folder = pathlib.Path(tempfile.mkdtemp(prefix="resnet_flax-"))
  remove = functools.partial(shutil.rmtree, folder, ignore_errors=True)
  atexit.register(remove)
  errors.at_end.append(remove)
  fetch(url, folder, name)
  return folder


def fetch(url: str, workdir: pathlib.Path, name: str = _KEY) -> None:
  """Fills an empty folder with the latest state at `url`, given by `name`."""
  store = _Store(url, name)
  with _explain(url, name):
    for tries_left in reversed(range(_TRIES)):
      states = store.states()
      if not states and not store.names("states"):
        raise errors.WorkdirError(
          f"{name}={url} holds no run: it must be a checkpoint.mirror."
        )
      try:
        fill(store, states, workdir)
        return
      except errors.WorkdirError:
        # A run that still trains may have removed the state meanwhile.
        if not tries_left or store.states() == states:
          raise
