"""Injects named faults into runs, and kills runs at random times.

  python -m experiments.faults --kills=50 --seed=0
    --out=experiments/faults/results.json [--faults=NAME,NAME]

The command prints a Markdown table and exits with 1 if a result is unexpected.
Some faults need root and the right to mount, or a prepared CIFAR-10 under
TFDS_DATA_DIR. Without it, the table lists them as skipped.
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import signal
import socket
import sys
import tempfile
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments.faults import harness, injections
from experiments.faults.case import Case, Job, Row
from experiments.tools import markdown
from resnet_flax.run import (
  command_line,
  environment,
  files as files_lib,
  surroundings,
)

_KILLS = flags.DEFINE_integer("kills", 50, "Random kills that hit a process.")
_SEED = flags.DEFINE_integer("seed", 0, "Draws times, signals, files, bytes.")
_OUT = flags.DEFINE_string("out", "", "JSON file, written after each fault.")
_FAULTS = flags.DEFINE_list(
  "faults",
  list(injections.FAULTS),
  f"Any of {', '.join(injections.FAULTS)}; empty for none.",
)
flags.register_validator(
  "faults",
  lambda names: set(names) <= {*injections.FAULTS, ""},
  f"must be any of {', '.join(injections.FAULTS)}, or empty.",
)
_SIGNALS = {signal.SIGKILL: 0.8, signal.SIGTERM: 0.1, signal.SIGINT: 0.1}
_COLUMNS = ("fault", "injected", "outcome", "bytes that differ", "note")
# The program's handlers may not be installed yet, so Python's own codes count.
_CODES_AT_START = {
  "SIGTERM": (-signal.SIGTERM, 128 + signal.SIGTERM),
  "SIGINT": (-signal.SIGINT, 128 + signal.SIGINT, 1),
}


def kill_at_random(job: Job, kills: int, seed: int) -> list[Any]:
  """Signals runs at random times until `kills` signals have ended a process.

  Half of the times fall before compilation ends, within the reference's time up
  to there. The other half fall after it, within the reference's remaining time
  from the moment that the attempt's step is compiled.

  Args:
    job: the job, which runs in new workdirs until each of them finishes.
    kills: number of signals that must end a process.
    seed: draws the signals and their times.

  Returns:
    The attempts and the number of differing bytes of each workdir, as JSON.
  """
  rng = np.random.default_rng(seed)
  reference = job.reference
  workdirs = []
  hits = 0
  while hits < kills:
    workdir = job.new_workdir()
    attempts: list[dict[str, Any]] = []
    while not attempts or _was_hit(attempts[-1]):
      process = harness.Process(job.arguments, workdir)
      if hits < kills:
        number = int(rng.choice(list(_SIGNALS), p=list(_SIGNALS.values())))
        wait = rng.uniform(0, reference.seconds_to_compiled)
        if rng.random() < 0.5:
          process.wait_until(process.is_compiled)
          wait = process.age + rng.uniform(
            0, reference.seconds - reference.seconds_to_compiled
          )
        process.wait_until(functools.partial(process.is_older, wait))
        process.send(number)
      attempts.append(process.end().as_json())
      # A signal does not count if its process finished anyway.
      hits += _was_hit(attempts[-1])
    different = None
    if attempts[-1]["exit_code"] == 0:
      found = harness.results(workdir)
      different = harness.num_different_bytes(reference.results, found)
    workdirs.append({"attempts": attempts, "different_bytes": different})
    print(f"{hits} kills; {different} bytes differ", file=sys.stderr)
  return workdirs


def kill_rows(workdirs: list[Any]) -> list[Row]:
  """Makes a row for each phase in which signals ended a process.

  Args:
    workdirs: from `kill_at_random`.
  """
  rows = []
  hits = collections.defaultdict(list)
  for index, workdir in enumerate(workdirs):
    for attempt in workdir["attempts"]:
      if _was_hit(attempt):
        hits[attempt["phase"]].append((index, attempt))
  for phase in sorted(hits):
    attempts = [attempt for _, attempt in hits[phase]]
    after = [
      workdirs[index]["different_bytes"]
      for index in {index for index, _ in hits[phase]}
    ]
    problems = [
      f"{attempt['signal']}: code {attempt['exit_code']}"
      for attempt in attempts
      if not _ended_well(attempt)
    ]
    problems += ["a run failed"] * after.count(None)
    different = sum(count or 0 for count in after)
    signals = collections.Counter(attempt["signal"] for attempt in attempts)
    note = ", ".join(f"{count} {name}" for name, count in signals.items())
    rows.append(
      Row(
        f"Killed while {phase}",
        len(attempts),
        "; ".join(problems) or ("differs" if different else "recovers"),
        different,
        note,
        not problems and not different,
      )
    )
  return rows


def _was_hit(attempt: dict[str, Any]) -> bool:
  """Whether a process got a signal and did not finish anyway."""
  return attempt["signal"] is not None and attempt["exit_code"] != 0


def _ended_well(attempt: dict[str, Any]) -> bool:
  """Whether a signalled process ended with the right exit code."""
  number = signal.Signals[attempt["signal"]]
  if number == signal.SIGKILL:
    return attempt["exit_code"] == -number
  if attempt["phase"] == "starting":
    return attempt["exit_code"] in _CODES_AT_START[attempt["signal"]]
  return attempt["exit_code"] == 128 + number


def inject(name: str, job: Job, seed: int) -> tuple[Row, list[Any]]:
  """Injects one named fault.

  Args:
    name: a key of `injections.FAULTS`.
    job: the job that the fault hits.
    seed: draws the random choices of the fault.

  Returns:
    The fault's row, and all attempts as JSON.
  """
  fault = injections.FAULTS[name]
  # The docstring's first line is the fault's name in the table.
  assert fault.__doc__ is not None
  title = fault.__doc__.splitlines()[0].rstrip(".")
  case = Case(job, np.random.default_rng(seed))
  try:
    fault(case)
  except injections.Skipped as skipped:
    return Row(title, 0, f"skipped: {skipped}", None, "", True), []
  if case.problems:
    print("".join(case.messages), file=sys.stderr, flush=True)
  row = Row(
    title,
    case.injected,
    "; ".join(case.problems) or case.outcome,
    case.different_bytes,
    ", ".join(case.notes),
    not case.problems,
  )
  return row, case.attempts


def _has_cifar10() -> bool:
  folder = os.environ.get("TFDS_DATA_DIR", "")
  return bool(folder) and pathlib.Path(folder, "cifar10").is_dir()


def _anonymous(value: Any, folder: pathlib.Path) -> Any:
  """Replaces this machine's folder and host name in JSON."""
  text = json.dumps(value)
  for local, name in ((str(folder), "FOLDER"), (socket.gethostname(), "HOST")):
    text = text.replace(local, name)
  return json.loads(text)


def main(argv: list[str]) -> None:
  """Injects the faults, prints each row, and writes the raw figures."""
  del argv
  surroundings.set_up()
  # A background job ignores SIGINT, and its runs would inherit that.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  rows: list[Row] = []
  results: dict[str, Any] = {
    "arguments": injections.DIGITS,
    "arguments_for_data": injections.CIFAR10,
    "kills": _KILLS.value,
    "seed": _SEED.value,
    "environment": environment.describe(jax.devices()),
    "reference": {},
    "killed": [],
    "faults": {},
    "table": [],
  }

  def add(new: list[Row]) -> None:
    for row in new:
      print(row, flush=True)
    rows.extend(new)
    results["table"] = [dataclasses.asdict(row) for row in rows]
    if _OUT.value:
      files_lib.write_json(
        pathlib.Path(_OUT.value), _anonymous(results, folder)
      )

  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    job = Job(folder / "digits", injections.DIGITS, half_done=27)
    on_cifar10 = Job(folder / "cifar10", injections.CIFAR10, half_done=3)
    results["reference"] = {
      "seconds": job.reference.seconds,
      "seconds_to_compiled": job.reference.seconds_to_compiled,
      "compared_bytes": sum(
        value.nbytes for value in job.reference.results.values()
      ),
    }
    print(markdown.table(_COLUMNS, []), flush=True)
    for name in filter(None, _FAULTS.value):
      needs_data = name in injections.ON_CIFAR10
      if needs_data and not _has_cifar10():
        text = "skipped: needs a prepared cifar10"
        add([Row(name.replace("_", " "), 0, text, None, "", True)])
        continue
      row, attempts = inject(
        name, on_cifar10 if needs_data else job, _SEED.value
      )
      results["faults"][name] = attempts
      add([row])
    results["killed"] = kill_at_random(job, _KILLS.value, _SEED.value)
    add(kill_rows(results["killed"]))
  wrong = [row.fault for row in rows if not row.as_expected]
  if wrong:
    sys.exit(f"not as expected: {'; '.join(wrong)}")


if __name__ == "__main__":
  app.run(main, flags_parser=command_line.parse_flags)
