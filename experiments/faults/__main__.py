"""Injects named faults into runs, and kills runs at random times.

  python -m experiments.faults --kills=50 --seed=0
    --out=experiments/faults/results.json [--faults=NAME,NAME]

The command prints a Markdown table and exits with 1 if a result is unexpected.
Some faults need root and the right to mount, or a prepared CIFAR-10 under
TFDS_DATA_DIR. The table lists a fault as skipped if its needs are not met.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import signal
import socket
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from experiments.faults import harness, injections
from experiments.faults.case import Case, Job, Row
from experiments.tools import flag_types, markdown
from resnet_flax.run import environment, files as files_lib, surroundings

_SIGNALS = {signal.SIGKILL: 0.8, signal.SIGTERM: 0.1, signal.SIGINT: 0.1}
_COLUMNS = ("fault", "injected", "outcome", "bytes that differ", "note")
# The program's handlers may not be installed yet, so Python's own codes count.
_CODES_AT_START = {
  "SIGTERM": (-signal.SIGTERM, 128 + signal.SIGTERM),
  "SIGINT": (-signal.SIGINT, 128 + signal.SIGINT, 1),
}


def kill_at_random(job: Job, kills: int, seed: int) -> list[Any]:
  """Signals runs at random times until `kills` signals have ended a process.

  Half of the times are drawn from the reference's seconds before its step was
  compiled. The other half are drawn from the reference's seconds after that,
  and count from the compilation of this attempt's step. A job is started again
  until it finishes; then a new workdir follows. Gives every workdir's attempts
  and number of differing bytes, as JSON.
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
        process.wait_until_age(wait)
        process.send(number)
      attempts.append(process.end().as_json())
      # A signal does not count if its process finished anyway.
      hits += _was_hit(attempts[-1])
    different = None
    if attempts[-1]["exit_code"] == 0:
      run_results = harness.results(workdir)
      different = harness.num_different_bytes(reference.results, run_results)
    workdirs.append({"attempts": attempts, "different_bytes": different})
    print(f"{hits} kills; {different} bytes differ", file=sys.stderr)
  return workdirs


def kill_rows(workdirs: list[Any]) -> list[Row]:
  """Makes a row for each phase in which signals ended a process.

  Runs that no signal hit get one more row if they failed or differ.
  """
  rows = []
  hits = collections.defaultdict(list)
  outcomes: dict[str, dict[int, int | None]] = collections.defaultdict(dict)
  for index, workdir in enumerate(workdirs):
    for attempt in filter(_was_hit, workdir["attempts"]):
      hits[attempt["phase"]].append(attempt)
      outcomes[attempt["phase"]][index] = workdir["different_bytes"]
  for phase, attempts in sorted(hits.items()):
    counts = list(outcomes[phase].values())
    problems = [
      f"{attempt['signal']}: code {attempt['exit_code']}"
      for attempt in attempts
      if not _ended_well(attempt)
    ]
    problems += ["a run failed"] * counts.count(None)
    different = sum(filter(None, counts))
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
  wrong = [
    workdir
    for workdir in workdirs
    if workdir["different_bytes"] != 0
    and not any(map(_was_hit, workdir["attempts"]))
  ]
  if wrong:
    outcome = "a run failed or differs"
    rows.append(Row("Not killed", len(wrong), outcome, None, "", False))
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
  """Injects a fault into a job; gives its row, and all attempts as JSON."""
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


def _anonymous(value: Any, folder: pathlib.Path) -> Any:
  """Replaces this machine's folder and host name in JSON."""
  text = json.dumps(value)
  for local, name in ((str(folder), "FOLDER"), (socket.gethostname(), "HOST")):
    text = text.replace(local, name)
  return json.loads(text)


def main() -> None:
  """Injects the faults, prints each row, and writes the raw figures."""
  parser = argparse.ArgumentParser("python -m experiments.faults")
  add, known = parser.add_argument, injections.FAULTS
  count = flag_types.count
  add("--kills", type=count, default=50, help="kills that hit a process")
  add("--seed", type=int, default=0, help="draws times, signals, files, bytes")
  add("--out", type=flag_types.new_file, help="written after each fault")
  add("--faults", type=flag_types.names(known), default=",".join(known))
  flags = parser.parse_args()
  surroundings.set_up()
  # A background job ignores SIGINT, and its runs would inherit that.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  rows: list[Row] = []
  results: dict[str, Any] = {
    "arguments": injections.DIGITS,
    "arguments_for_data": injections.CIFAR10,
    "kills": flags.kills,
    "seed": flags.seed,
    "environment": environment.describe(jax.devices()),
    "reference": {},
    "killed": [],
    "faults": {},
    "table": [],
  }

  def show(new: list[Row]) -> None:
    for row in new:
      print(row, flush=True)
    rows.extend(new)
    results["table"] = [dataclasses.asdict(row) for row in rows]
    if flags.out:
      files_lib.write_json(flags.out, _anonymous(results, folder))

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
    for name in flags.faults:
      target = on_cifar10 if name in injections.ON_CIFAR10 else job
      row, results["faults"][name] = inject(name, target, flags.seed)
      show([row])
    results["killed"] = kill_at_random(job, flags.kills, flags.seed)
    show(kill_rows(results["killed"]))
  wrong = [row.fault for row in rows if not row.as_expected]
  if wrong:
    sys.exit(f"error: not as expected: {'; '.join(wrong)}")


if __name__ == "__main__":
  main()
