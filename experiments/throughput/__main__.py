"""Compares training and inference on a CPU with other frameworks.

  python -m experiments.throughput [--out=experiments/throughput/comparison]
    [--rounds=7] [--seconds=8] [--depths=20] [--batch_sizes=32,128]
    [--programs=ours,plain,...] [--threads=2] [--peers=.peers]

For each depth and batch size every program gets a process, in the environment
of its framework (`python -m experiments.throughput.environments` makes them).
All programs build once, one after the other. Then they take turns in
several rounds, in alternating order; waiting programs block on input. The
command writes DIR/results.json after each window and makes the tables and the
figure at the end. Nothing else should run meanwhile.
"""

import argparse
import datetime
import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax

from experiments.throughput import environments, processes, report
from experiments.throughput.programs import PROGRAMS
from experiments.tools import flag_types
from resnet_flax.run import environment, errors, files as files_lib, huge_pages

# The length of each kind of window, as a share of --seconds.
LENGTHS = {"train": 1.0, "resident": 1.0, "infer": 0.5, "matmul": 0.125}


def _depths(text: str) -> list[int]:
  depths = flag_types.integers(text)
  if any(depth < 8 or (depth - 2) % 6 for depth in depths):
    raise argparse.ArgumentTypeError(f"{text} must be 6n+2, for example 20,56")
  return depths


def parse(arguments: list[str]) -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser("python -m experiments.throughput")
  add = parser.add_argument
  add("--out", type=flag_types.output, default=report.PUBLISHED)
  add("--rounds", type=flag_types.count, default=7)
  add("--seconds", type=float, default=8.0)
  add("--depths", type=_depths, default="20")
  add("--batch_sizes", type=flag_types.integers, default="32,128")
  add("--programs", type=flag_types.names(PROGRAMS), default=",".join(PROGRAMS))
  add("--threads", type=flag_types.count, default=environment.num_cpu_threads())
  add("--peers", type=pathlib.Path, default=environments.DEFAULT)
  return parser.parse_args(arguments)


def commands(programs: list[str], peers: pathlib.Path) -> dict[str, list[str]]:
  """The command that starts each program's worker.

  `peers` has the other frameworks' environments. Raises `UserError` if it lacks
  one.
  """
  by_program = {}
  for name in programs:
    program = PROGRAMS[name]
    python = sys.executable
    if program.peer:
      python = environments.python(peers, program.peer)
    module = f"experiments.throughput.workers.{program.worker}"
    by_program[name] = [python, "-m", module, *program.flags]
  return by_program


def check_clean(root: pathlib.Path, out: pathlib.Path) -> None:
  """Raises `UserError` unless `root` is a git checkout without changes.

  Only `out`, the folder of the results, may differ from the commit.
  """
  command = ["git", "status", "--porcelain", "--untracked-files=all", "--", "."]
  if out.resolve().is_relative_to(root):
    command.append(f":(exclude){out.resolve().relative_to(root)}")
  status = subprocess.run(command, cwd=root, capture_output=True, text=True)
  if status.returncode:
    raise errors.UserError(
      f"{root} must be a git checkout, as results name their commit."
    )
  if status.stdout:
    first = status.stdout.splitlines()[0].strip()
    raise errors.UserError(
      f"{root} differs from its commit ({first}): commit or stash the changes"
      " first, as results name their commit."
    )


def benchmark(flags: argparse.Namespace) -> None:
  """Measures all programs and saves after each window.

  Raises `UserError` if an environment or Matplotlib is missing, results exist,
  files differ from the commit, or a worker fails.
  """
  path = flags.out / "results.json"
  if path.exists():
    raise errors.UserError(
      f"{path} already exists: remove it, or choose another --out."
    )
  if importlib.util.find_spec("matplotlib") is None:
    raise errors.UserError(
      "the figure needs matplotlib: pip install -e '.[figures]'"
    )
  workers = commands(flags.programs, flags.peers)
  check_clean(environments.ROOT, flags.out)
  jax.config.update("jax_platforms", "cpu")
  results: dict[str, Any] = {
    "date": datetime.date.today().isoformat(),
    "settings": {
      name: getattr(flags, name) for name in ("rounds", "seconds", "threads")
    },
    "environment": environment.describe(jax.devices()),
    "load_average": os.getloadavg(),
    "programs": [],
    "windows": [],
  }
  flags.out.mkdir(parents=True, exist_ok=True)
  for depth in flags.depths:
    for batch_size in flags.batch_sizes:
      setting = {"depth": depth, "batch_size": batch_size}
      with processes.started(
        workers, setting, flags.threads, results["programs"]
      ) as built:
        for window in windows(built, flags):
          results["windows"].append({**setting, **window})
          files_lib.write_json(path, results)


def windows(
  workers: dict[str, processes.Worker], flags: argparse.Namespace
) -> Iterator[dict[str, Any]]:
  """Lets the workers of one depth and batch size measure in turn.

  Yields each answer with its round, its program and the processor time that the
  waiting workers used.
  """
  for round_number in range(flags.rounds):
    # The order alternates, so that the machine's drift favours no program.
    direction = -1 if round_number % 2 else 1
    order = list(workers)[::direction]
    print(f"round {round_number + 1}/{flags.rounds}", file=sys.stderr)
    for program in order:
      worker = workers[program]
      others = [each for each in workers.values() if each is not worker]
      for kind in worker.facts["kinds"][::direction]:
        before = sum(each.cpu_seconds() for each in others)
        answer = worker.ask(f"{kind} {LENGTHS[kind] * flags.seconds}")
        waiting = sum(each.cpu_seconds() for each in others) - before
        yield {
          "round": round_number,
          "program": program,
          **answer,
          "waiting_cpu_seconds": round(waiting, 2),
        }


def main() -> None:
  """Measures, then makes the tables and the figure."""
  flags = parse(sys.argv[1:])
  try:
    benchmark(flags)
  except errors.UserError as error:
    raise SystemExit(f"error: {error}") from error
  report.write(flags.out)


if __name__ == "__main__":
  # All workers inherit the setting.
  huge_pages.use()
  main()
