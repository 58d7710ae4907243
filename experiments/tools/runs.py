"""From finished runs to an experiment's raw file, figure and table."""

import argparse
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments.tools import markdown
from resnet_flax.run import files as files_lib, folder, metrics

Run = dict[str, Any]  # What a raw file keeps of a run.


def finished(
  workdir: pathlib.Path,
) -> Iterator[tuple[pathlib.Path, ConfigDict, list[metrics.Record]]]:
  """Yields each finished run in a sweep's folder, by its name.

  With its configuration and the records of its epochs.
  """
  for path in sorted(workdir.glob("*/config.json")):
    run = path.parent
    config = folder.load_config(run)
    records = metrics.MetricsLog(run, config).read()
    if len(records) >= config.num_epochs:
      yield run, config, records


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
  """Adds what `collect` keeps of --workdir's runs to `raw_file`, JSON.

  A run replaces the one there that has its `key`, by which they are sorted; the
  others, of earlier workdirs, stay. The figure and the table of all go to the
  PNG file and to README.md beside it, where markers have the table's name and
  the command.
  """
  parser = argparse.ArgumentParser(command)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  workdir = parser.parse_args().workdir
  if not os.path.isdir(workdir):  # Not Path.is_dir: a name may be too long.
    parser.error(f"--workdir={workdir} must be a folder of runs")
  found = collect(workdir)
  if not found:
    parser.error(f"--workdir={workdir} must hold a finished run")
  earlier = json.loads(raw_file.read_text()) if raw_file.exists() else []
  kept = {key(run): run for run in [*earlier, *found]}
  runs = [kept[each] for each in sorted(kept)]
  # Before anything is written: these may be another experiment's runs.
  try:
    drawn, rows = draw(runs), table(runs)
  except ValueError as error:
    parser.error(f"--workdir={workdir} does not fit {raw_file.name}: {error}")
  files_lib.write_json(raw_file, runs)
  drawn.savefig(raw_file.with_name(figure), dpi=110)
  markdown.update(raw_file.with_name("README.md"), name, command, rows)
