"""Compares training and inference on a CPU with other frameworks.

  python -m experiments.throughput --out=DIR [--rounds=3] [--depths=20,56]
    [--batch_sizes=32,128] [--programs=ours,plain,keras,torch] [--seconds=6]
    [--peers=.peers]

Every measurement has its own process, in the environment of its framework
(`python -m experiments.throughput.environments` makes them). The programs take
turns in several rounds, in alternating order. The command writes
DIR/results.json after each measurement and makes the tables and the figure at
the end. `python -m experiments.throughput.report --out=DIR` makes them again.
Nothing else should run meanwhile.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from experiments.throughput import environments, report
from resnet_flax.run import errors, files as files_lib

# Each program's worker, and the environment that it needs besides ours.
PROGRAMS = {
  "ours": ("ours", None),
  "plain": ("plain", None),
  "keras": ("keras_tensorflow", "keras"),
  "torch": ("pytorch", "torch"),
}


def _ints(text: str) -> list[int]:
  return [int(part) for part in text.split(",")]


def _depths(text: str) -> list[int]:
  depths = _ints(text)
  if any(depth < 8 or (depth - 2) % 6 for depth in depths):
    raise argparse.ArgumentTypeError(f"{text} must be 6n+2, for example 20,56")
  return depths


def _programs(text: str) -> list[str]:
  programs = text.split(",")
  if unknown := set(programs) - set(PROGRAMS):
    raise argparse.ArgumentTypeError(
      f"{', '.join(sorted(unknown))} must be any of {', '.join(PROGRAMS)}"
    )
  return programs


def parse(arguments: list[str]) -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    "python -m experiments.throughput",
    description="Compares frameworks on a CPU.",
  )
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--depths", type=_depths, default="20,56")
  parser.add_argument("--batch_sizes", type=_ints, default="32,128")
  parser.add_argument("--programs", type=_programs, default=",".join(PROGRAMS))
  parser.add_argument("--seconds", type=float, default=6.0)
  parser.add_argument(
    "--peers", type=pathlib.Path, default=environments.DEFAULT
  )
  return parser.parse_args(arguments)


def commands(programs: list[str], peers: pathlib.Path) -> dict[str, list[str]]:
  """Builds the command that starts each program's worker.

  Args:
    programs: keys of `PROGRAMS`.
    peers: the folder of the other frameworks' environments.

  Raises:
    UserError: an environment is missing.
  """
  started = {}
  for program in programs:
    worker, peer = PROGRAMS[program]
    python = environments.python(peers, peer) if peer else sys.executable
    module = f"experiments.throughput.workers.{worker}"
    started[program] = [str(python), "-m", module]
  return started


def _measure(command: list[str], settings: dict[str, Any]) -> dict[str, Any]:
  """Runs a worker and returns its report.

  Args:
    command: the command that starts the worker.
    settings: the worker's flags.

  Raises:
    UserError: the worker fails.
  """
  process = subprocess.run(
    [*command, *(f"--{name}={value}" for name, value in settings.items())],
    cwd=environments.ROOT,
    env={
      **os.environ,
      # All frameworks use the CPU, even if there is a GPU.
      "CUDA_VISIBLE_DEVICES": "",
      "JAX_PLATFORMS": "cpu",
      "KERAS_BACKEND": "tensorflow",
    },
    capture_output=True,
    text=True,
  )
  lines = process.stdout.splitlines()
  if process.returncode or not lines:
    raise errors.UserError(
      f"{' '.join(process.args)} failed with exit status {process.returncode};"
      f" its messages end with:\n{process.stderr[-3000:]}"
    )
  return json.loads(lines[-1])


def benchmark(flags: argparse.Namespace) -> None:
  """Measures all programs and saves after each measurement.

  Args:
    flags: from `parse`.

  Raises:
    UserError: an environment or Matplotlib is missing, or results exist.
  """
  path = flags.out / "results.json"
  if path.exists():
    raise errors.UserError(f"{path} already exists: choose another --out.")
  if importlib.util.find_spec("matplotlib") is None:
    raise errors.UserError(
      "the figure needs matplotlib: pip install -e '.[figures]'"
    )
  workers = commands(flags.programs, flags.peers)
  flags.out.mkdir(parents=True, exist_ok=True)
  measurements: list[dict[str, Any]] = []
  results = {
    "settings": {"rounds": flags.rounds, "seconds": flags.seconds},
    "measurements": measurements,
  }
  for round_number in range(flags.rounds):
    # The order alternates, so that the machine's drift favours no program.
    order = list(workers)[:: -1 if round_number % 2 else 1]
    for depth in flags.depths:
      for batch_size in flags.batch_sizes:
        for program in order:
          setting = {"depth": depth, "batch_size": batch_size}
          measured = _measure(
            workers[program], {**setting, "seconds": flags.seconds}
          )
          measurements.append(
            {"round": round_number, "program": program, **setting, **measured}
          )
          files_lib.write_json(path, results)
          print(
            f"round {round_number + 1}/{flags.rounds}, ResNet-{depth}, batch"
            f" {batch_size}, {program}:"
            f" {measured['train_images_per_second']:.0f} images/s",
            file=sys.stderr,
            flush=True,
          )


def main() -> None:
  """Measures, then makes the tables and the figure."""
  flags = parse(sys.argv[1:])
  try:
    benchmark(flags)
  except errors.UserError as error:
    raise SystemExit(f"error: {error}") from error
  report.write(flags.out)


if __name__ == "__main__":
  main()
