"""Makes an experiment's raw file, figure and table from finished runs."""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments.tools import markdown
from resnet_flax.run import (
  checkpoint,
  errors,
  files as files_lib,
  folder,
  metrics,
)

Run = dict[str, Any]  # A run in a raw file.


def finished(
  workdir: pathlib.Path,
) -> Iterator[tuple[pathlib.Path, ConfigDict, list[metrics.Record]]]:
  """Yields the finished runs in a sweep's folder, sorted by name.

  A run has its workdir, its configuration and the records of its epochs. A run
  without its last checkpoint is left out, and a line on stderr names it.
  """
  for path in sorted(workdir.glob("*/config.json")):
    run = path.parent
    config = folder.load_config(run)
    records = metrics.MetricsLog(run, config).read()
    if len(records) < config.num_epochs:
      continue
    # A killed run may have a record without its epoch's checkpoint.
    if records[-1]["step"] in checkpoint.steps(run):
      yield run, config, records
    else:
      print(f"left out: {run} has no last checkpoint", file=sys.stderr)


def report(
  command: str,
  name: str,
  raw_file: pathlib.Path,
  figure: str,
  collect: Callable[[pathlib.Path], list[Run]],
  key: Callable[[Run], tuple[Any, ...]],
  draw: Callable[[list[Run]], Figure],
  table: Callable[[list[Run]], str],
) -> None:
  """Adds the runs that `collect` finds in --workdir to `raw_file`, JSON.

  A run replaces an earlier run with the same `key`; other runs stay, and `key`
  sorts all runs. The PNG file `figure` and README.md, both beside `raw_file`,
  get the figure and the table of all runs. Markers in README.md have `name` and
  `command`.
  """
  parser = argparse.ArgumentParser(command)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  workdir = parser.parse_args().workdir
  if not os.path.isdir(workdir):  # Not Path.is_dir: a name may be too long.
    parser.error(f"--workdir={workdir} must be a folder of runs")
  try:
    new_runs = collect(workdir)
  except errors.UserError as error:
    # The rest of the advice is for someone who trains.
    reason = str(error).partition(" Pass another --workdir,")[0]
    parser.error(f"--workdir={workdir} cannot be used: {reason}")
  if not new_runs:
    parser.error(f"--workdir={workdir} must hold a finished run")
  earlier = json.loads(raw_file.read_text()) if raw_file.exists() else []
  by_key = {key(run): run for run in [*earlier, *new_runs]}
  runs = [by_key[each] for each in sorted(by_key)]
  # This comes before writing: the runs may be another experiment's.
  try:
    drawn, rows = draw(runs), table(runs)
  except ValueError as error:
    parser.error(f"--workdir={workdir} does not fit {raw_file.name}: {error}")
  files_lib.write_json(raw_file, runs)
  drawn.savefig(raw_file.with_name(figure), dpi=110)
  markdown.update(raw_file.with_name("README.md"), name, command, rows)
