import json
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from experiments.faults import __main__ as faults, harness, injections
from experiments.faults.case import Job

# The command, on a quarter of the images in as many steps.
SMALL = """\
import runpy

from experiments.faults import injections

injections.DIGITS += (
  "--config.batch_size=8", "--config.dataset.train_examples=160"
)
runpy.run_module("experiments.faults", run_name="__main__")
"""


def results(**changes):
  return {
    "records": np.bytes_(b'[{"epoch": 0}]'),
    "latest/step": np.array(7, np.int32),
    "latest/w": np.arange(4, dtype=np.float32),
    **changes,
  }


def test_equal_results_have_no_different_bytes():
  assert harness.num_different_bytes(results(), results()) == 0


def test_a_flipped_bit_is_one_different_byte():
  other = np.arange(4, dtype=np.float32)
  other.view(np.uint8)[5] ^= 1
  found = harness.num_different_bytes(results(), results(**{"latest/w": other}))
  assert found == 1


def test_minus_zero_is_not_zero():
  one, other = {"w": np.float32(0.0)}, {"w": np.float32(-0.0)}
  assert harness.num_different_bytes(one, other) == 1


def test_equal_nans_do_not_differ():
  one, other = ({"w": np.float32(np.nan)} for _ in range(2))
  assert harness.num_different_bytes(one, other) == 0


@pytest.mark.parametrize("missing_first", [True, False])
def test_all_bytes_of_a_missing_array_count(missing_first):
  less = results()
  del less["latest/w"]
  pair = (less, results()) if missing_first else (results(), less)
  assert harness.num_different_bytes(*pair) == 16


def test_a_longer_record_counts_with_what_it_has_more():
  longer = results(records=np.bytes_(b'[{"epoch": 0}]...'))
  assert harness.num_different_bytes(results(), longer) == 3


@pytest.mark.parametrize(
  ("code", "lines", "error"),
  [
    (1, ["compiling\n", "error: no space\n"], "error: no space"),
    (0, ["error: no space\n"], ""),
    (-9, ["error: no space\n"], ""),
    (1, ["Traceback (most recent call last):\n", "error: no space\n"], ""),
    (1, ["OSError: no space\n"], ""),
    (1, [], ""),
  ],
)
def test_only_a_last_line_without_traceback_is_an_error(code, lines, error):
  assert harness.Ended(code, lines, 1.0).error == error


def attempt(number, phase, code):
  return {
    "signal": signal.Signals(number).name,
    "phase": phase,
    "exit_code": code,
  }


def test_rows_count_hits_by_phase():
  finished = {"signal": None, "phase": None, "exit_code": 0}
  workdirs = [
    {
      "attempts": [
        attempt(signal.SIGKILL, "compiling", -9),
        attempt(signal.SIGTERM, "training", 143),
        attempt(signal.SIGKILL, "training", -9),
        finished,
      ],
      "different_bytes": 0,
    },
    {
      "attempts": [attempt(signal.SIGINT, "compiling", 130), finished],
      "different_bytes": 5,
    },
  ]
  compiling, training = faults.kill_rows(workdirs)
  assert (compiling.injected, compiling.different_bytes) == (2, 5)
  assert not compiling.as_expected
  assert (training.injected, training.different_bytes) == (2, 0)
  assert training.as_expected
  assert training.note == "1 SIGTERM, 1 SIGKILL"


@pytest.mark.parametrize("code", [1, -signal.SIGTERM])
def test_a_signal_that_is_not_met_is_not_as_expected(code):
  workdir = {
    "attempts": [attempt(signal.SIGTERM, "training", code)],
    "different_bytes": 0,
  }
  (row,) = faults.kill_rows([workdir])
  assert not row.as_expected
  assert f"SIGTERM: code {code}" in row.outcome


def test_a_signal_in_vain_is_no_hit():
  workdir = {
    "attempts": [
      attempt(signal.SIGKILL, "training", -9),
      attempt(signal.SIGKILL, "evaluating", 0),
    ],
    "different_bytes": 0,
  }
  (row,) = faults.kill_rows([workdir])
  assert row.fault == "Killed while training"
  assert row.injected == 1


@pytest.mark.parametrize("different", [None, 3])
def test_a_run_that_no_signal_hit_is_looked_at(different):
  ended = {"signal": None, "phase": None, "exit_code": int(different is None)}
  workdir = {"attempts": [ended], "different_bytes": different}
  (row,) = faults.kill_rows([workdir])
  assert not row.as_expected


def test_a_run_that_did_not_finish_is_not_as_expected():
  workdir = {
    "attempts": [attempt(signal.SIGKILL, "training", -9)],
    "different_bytes": None,
  }
  assert not faults.kill_rows([workdir])[0].as_expected


def test_a_fault_with_a_problem_is_not_as_expected(tmp_path, monkeypatch):
  def fault(case):
    """A fault."""
    case.expect(True, "never")
    case.expect(False, "it broke")

  monkeypatch.setitem(injections.FAULTS, "fault", fault)
  job = Job(tmp_path / "job", injections.DIGITS, half_done=27)
  row, _ = faults.inject("fault", job, seed=0)
  assert row.outcome == "it broke"
  assert not row.as_expected


def test_one_byte_is_flipped(tmp_path):
  path = tmp_path / "file"
  before = np.arange(100, dtype=np.uint8)
  path.write_bytes(before.tobytes())
  injections._flip(path, np.random.default_rng(0))
  after = np.frombuffer(path.read_bytes(), np.uint8)
  assert after.size == 100
  assert (before != after).sum() == 1


@pytest.mark.slow
def test_a_small_part(tmp_path):
  out = tmp_path / "results.json"
  command = [
    *(sys.executable, "-c", SMALL, "--kills=1"),
    *("--faults=truncated_checkpoint", f"--out={out}"),
  ]
  ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert ended.returncode == 0, ended.stdout + ended.stderr
  found = json.loads(out.read_text())
  assert set(found["faults"]) == {"truncated_checkpoint"}
  hits = [
    attempt["signal"]
    for workdir in found["killed"]
    for attempt in workdir["attempts"]
    if faults._was_hit(attempt)
  ]
  assert len(hits) == 1
  assert all(row["different_bytes"] == 0 for row in found["table"])
  # Nothing of this machine is kept.
  assert tempfile.gettempdir() not in out.read_text()
