import os
import pathlib
import signal
import tarfile

import numpy as np
import pytest

from experiments.fuzz import mutations, reading
from resnet_flax.data import archive
from resnet_flax.run import errors


@pytest.fixture
def expected(tmp_path):
  return reading.intact_contents(tmp_path)


def test_nothing_is_found(tmp_path):
  results = reading.fuzz(0, 60.0, tmp_path / "findings", most=60)
  assert results["findings"] == []
  assert not (tmp_path / "findings").exists()
  counts = results["outcomes"]
  assert {kind: sum(each.values()) for kind, each in counts.items()} == (
    dict.fromkeys(mutations.KINDS, 4)
  )
  text = reading.table(results)
  assert "| all | 60 |" in text
  assert "findings: 0." in text


def test_intact_archive_is_plain_tar(tmp_path, expected):
  """And what it is compared with is what `tarfile` finds in it."""
  with tarfile.open(tmp_path / "intact.tar.gz") as tar:
    names = tar.getnames()
    raw = tar.extractfile("small-batches-bin/test_batch.bin").read()
  assert names[0] == mutations.SPEC.folder
  assert len(names) == 6
  assert raw[0] == expected.labels["test"][0, 0]
  planes = np.frombuffer(raw[1:3073], np.uint8).reshape(3, 32, 32)
  np.testing.assert_array_equal(
    planes.transpose(1, 2, 0), expected.images["test"][0]
  )


def test_inputs_are_functions_of_seed_and_index():
  inputs = [mutations.make(0, index) for index in range(30)]
  assert inputs == [mutations.make(0, index) for index in range(30)]
  assert len({raw for _, raw in inputs}) > 25
  assert inputs != [mutations.make(1, index) for index in range(30)]


def raising(error):
  def read(spec, path):
    del spec, path
    raise error

  return read


def chained(path):
  error = errors.DataError(f"{path}: too large")
  error.__cause__ = MemoryError()
  return error


@pytest.mark.parametrize(
  ("make", "reason"),
  [
    (lambda _: RecursionError("deep"), "RecursionError: deep"),
    (lambda _: SystemExit(1), "SystemExit"),
    (lambda _: errors.DataError("some file"), "not one line that names"),
    (lambda path: errors.DataError(f"{path}" * 100), "not one line"),
    (chained, "too much memory"),
  ],
)
def test_what_a_finding_is(monkeypatch, tmp_path, expected, make, reason):
  path = tmp_path / "a.tar.gz"
  monkeypatch.setattr(archive, "read", raising(make(path)))
  outcome, why = reading.judge(path, expected)
  assert outcome == "finding"
  assert reason in why


@pytest.mark.parametrize("change", ["label", "shape", "names"])
def test_wrong_arrays_are_a_finding(monkeypatch, tmp_path, expected, change):
  labels = {split: part.copy() for split, part in expected.labels.items()}
  images, names = dict(expected.images), dict(expected.names)
  if change == "label":
    labels["train"][0] = 10
  elif change == "shape":
    images["test"], labels["test"] = images["test"][:1], labels["test"][:1]
  else:
    names["label"] = [*names["label"], "one_more"]
  contents = archive.ArchiveContents(images, labels, names)
  monkeypatch.setattr(archive, "read", lambda *_: contents)
  assert reading.judge(tmp_path / "a", expected)[0] == "finding"


def test_a_hang_and_a_crash_are_findings(tmp_path, expected):
  del expected
  reader = reading.Reader(time_limit=0.1)
  # Hangs, however slow this process is.
  os.kill(reader._process.pid, signal.SIGSTOP)
  (outcome, reason), _, _ = reader.judge(tmp_path / "intact.tar.gz")
  assert (outcome, reason) == ("finding", "no end after 0.1 s")
  reader.close()
  reader = reading.Reader()
  # Ends the child, as a crash would.
  (outcome, reason), _, _ = reader.judge(None)
  assert outcome == "finding"
  assert "died with exit code" in reason
  # And the next one is read.
  result, _, _ = reader.judge(tmp_path / "intact.tar.gz")
  assert result == ("same", "")
  reader.close()


def test_a_finding_is_kept_and_reported(monkeypatch, tmp_path, capsys):
  class Reader:
    def judge(self, path):
      assert pathlib.Path(path).exists()
      return ("finding", "a reason"), 0.5, 2_000_000

    def close(self):
      pass

  monkeypatch.setattr(reading, "Reader", Reader)
  results = reading.fuzz(7, 60.0, tmp_path, most=2)
  kind, raw = mutations.make(7, 1)
  assert (tmp_path / "7-1.tar.gz").read_bytes() == raw
  found = {"index": 1, "kind": kind, "reason": "a reason"}
  assert results["findings"][1] == found
  assert f"finding: input 1 ({kind}): a reason" in capsys.readouterr().out
  assert "peak memory 2 MB" in reading.table(results)
