"""Reads hostile archives in a child process and judges what comes of it."""

import collections
import multiprocessing
import multiprocessing.connection
import pathlib
import re
import resource
import sys
import tempfile
import time
from typing import Any

import numpy as np

from experiments.fuzz import mutations
from resnet_flax.data import archive, dataset as record
from resnet_flax.run import errors

# Seconds: what is tried here is far smaller than an official archive.
TIME_LIMIT = 5.0
# Of address space, above what the child has when it starts.
MEMORY_LIMIT = 1 << 29

Outcome = tuple[str, str]


def intact_contents(folder: pathlib.Path) -> archive.ArchiveContents:
  """What the archive holds before anything is done to it."""
  path = folder / "intact.tar.gz"
  path.write_bytes(mutations.compress(mutations.to_tar(mutations.intact())))
  return archive.read(mutations.SPEC, path)


def judge(path: pathlib.Path, expected: archive.ArchiveContents) -> Outcome:
  """Reads one archive.

  Args:
    path: of the archive.
    expected: what it held before it was changed.

  Returns:
    'refused', 'same', 'other' (valid arrays) or 'finding', and for people why.
  """
  try:
    contents = archive.read(mutations.SPEC, path)
  except errors.DataError as error:
    message = str(error)
    if "\n" in message or str(path) not in message or len(message) > 1000:
      return "finding", f"not one line that names the file: {message!r}"
    if isinstance(error.__cause__, MemoryError):
      return "finding", f"it wants too much memory: {message}"
    # Numbers and names differ from input to input.
    return "refused", re.sub(r"\d+", "N", message.replace(str(path), "FILE"))
  except BaseException as error:
    return "finding", errors.one_line(error)
  problem = _problem(contents)
  if problem:
    return "finding", problem
  return ("same" if _same(contents, expected) else "other"), ""


def _problem(contents: archive.ArchiveContents) -> str:
  """What is wrong with arrays that were not refused."""
  names = contents.names["label"]
  try:
    record.check(
      record.Arrays(
        train_images=contents.images["train"],
        train_labels=contents.labels["train"][:, 0].astype(np.int32),
        test_images=contents.images["test"],
        test_labels=contents.labels["test"][:, 0].astype(np.int32),
        class_names=tuple(names),
      ),
      "small",
      (32, 32, 3),
    )
  except errors.DataError as error:
    return str(error)
  counts = {split: len(images) for split, images in contents.images.items()}
  if counts != {"train": 4, "test": 2} or len(names) != 10:
    return f"{counts} images, {len(names)} names"
  return ""


def _same(
  contents: archive.ArchiveContents, expected: archive.ArchiveContents
) -> bool:
  return contents.names == expected.names and all(
    np.array_equal(getattr(contents, arrays)[split], of_split)
    for arrays in ("images", "labels")
    for split, of_split in getattr(expected, arrays).items()
  )


def _child(connection: multiprocessing.connection.Connection) -> None:
  """Judges the files whose paths come in; sends outcome, seconds, memory."""
  if sys.platform == "linux":
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  with tempfile.TemporaryDirectory() as folder:
    expected = intact_contents(pathlib.Path(folder))
  before = _forget_peak()
  connection.send("ready")
  while (path := connection.recv()) is not None:
    started = time.perf_counter()
    outcome = judge(path, expected)
    seconds = time.perf_counter() - started
    connection.send((outcome, seconds, _peak_bytes() - before))


def _forget_peak() -> int:
  """Makes this process's peak its memory of now, where that can be done.

  Importing takes more than reading does, and would hide it.
  """
  if sys.platform == "linux":
    pathlib.Path("/proc/self/clear_refs").write_text("5")
  return _peak_bytes()


def _peak_bytes() -> int:
  """The most resident memory that this process has had."""
  if sys.platform == "linux":
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


class Reader:
  """A child process that reads archives, started anew when one ends it."""

  def __init__(self, time_limit: float = TIME_LIMIT):
    self._time_limit = time_limit
    self._start()

  def _start(self) -> None:
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    self._process = context.Process(target=_child, args=(theirs,), daemon=True)
    self._process.start()
    theirs.close()
    assert self._connection.recv() == "ready"

  def judge(self, path: pathlib.Path) -> tuple[Outcome, float, int]:
    """The outcome, seconds, and peak memory so far, in bytes above idle."""
    self._connection.send(path)
    if not self._connection.poll(self._time_limit):
      self.close(kill=True)
      self._start()
      reason = f"no end after {self._time_limit:g} s"
      return ("finding", reason), self._time_limit, 0
    try:
      return self._connection.recv()
    except EOFError:
      self.close(kill=True)
      reason = f"the process died with exit code {self._process.exitcode}"
      self._start()
      return ("finding", reason), 0.0, 0

  def close(self, *, kill: bool = False) -> None:
    """Ends the child."""
    if kill:
      self._process.kill()
    else:
      self._connection.send(None)
    self._process.join()
    self._connection.close()


def fuzz(
  seed: int, seconds: float, findings: pathlib.Path | None, most: int = 2**62
) -> dict[str, Any]:
  """Reads hostile archives until the time is over.

  Args:
    seed: of all inputs.
    seconds: how long.
    findings: folder for the files of findings, or None.
    most: inputs at most.

  Returns:
    `inputs`, `seconds`, `outcomes` (by kind), `reasons` (of refusals),
    `slowest` (its index, kind and seconds), `peak_mb` (memory above that of
    the idle child) and `findings` (index, kind and reason of each).
  """
  outcomes = {kind: collections.Counter[str]() for kind in mutations.KINDS}
  reasons = collections.Counter[str]()
  found: list[dict[str, Any]] = []
  slowest: dict[str, Any] = {"seconds": 0.0}
  peak, index, started = 0, 0, time.perf_counter()
  reader = Reader()
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "hostile.tar.gz"
    while index < most and time.perf_counter() - started < seconds:
      kind, raw = mutations.make(seed, index)
      path.write_bytes(raw)
      (outcome, reason), taken, memory = reader.judge(path)
      outcomes[kind][outcome] += 1
      peak = max(peak, memory)
      if taken > slowest["seconds"]:
        slowest = {"index": index, "kind": kind, "seconds": taken}
      if outcome == "refused":
        reasons[reason] += 1
      if outcome == "finding":
        found.append({"index": index, "kind": kind, "reason": reason})
        print(f"finding: input {index} ({kind}): {reason}", flush=True)
        if findings is not None:
          findings.mkdir(parents=True, exist_ok=True)
          (findings / f"{seed}-{index}.tar.gz").write_bytes(raw)
      index += 1
  reader.close()
  return {
    "inputs": index,
    "seconds": time.perf_counter() - started,
    "outcomes": {kind: dict(counts) for kind, counts in outcomes.items()},
    "reasons": dict(reasons.most_common()),
    "slowest": slowest,
    "peak_mb": peak / 1e6,
    "findings": found,
  }


def table(results: dict[str, Any]) -> str:
  """Counts by kind of mutation, in Markdown, and what stands out."""
  columns = ("refused", "same", "other", "finding")
  lines = [
    f"| mutation | inputs | {' | '.join(columns)} |",
    "|" + " --- |" * (len(columns) + 2),
  ]
  total = collections.Counter[str]()
  for kind, counts in [*results["outcomes"].items(), ("all", total)]:
    cells = [f"{counts.get(column, 0):,}" for column in columns]
    lines.append(f"| {kind} | {sum(counts.values()):,} | {' | '.join(cells)} |")
    if counts is not total:
      total.update(counts)
  slowest = results["slowest"]
  lines += [
    "",
    f"{results['inputs']:,} inputs in {results['seconds']:.0f} s;"
    f" {len(results['reasons'])} different refusals; slowest"
    f" {slowest['seconds']:.3f} s (input {slowest.get('index')},"
    f" {slowest.get('kind')}); peak memory {results['peak_mb']:.0f} MB above"
    f" idle; findings: {len(results['findings'])}.",
  ]
  return "\n".join(lines)
