"""From finished runs to an experiment's raw file, figure and table."""

import argparse
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from experiments.tools import markdown
from resnet_flax.run import files as files_lib, folder, metrics


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
  collect: Callable[[pathlib.Path], Any],
  draw: Callable[[Any], Any],
  table: Callable[[Any], str],
) -> None:
  """Writes what `collect` makes of --workdir, its figure and its table.

  The first goes to `raw_file`, JSON, the others to the PNG file and to
  README.md beside it, where markers have the table's name and the command.
  """
  parser = argparse.ArgumentParser(command)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  workdir = parser.parse_args().workdir
  if not os.path.isdir(workdir):  # Not Path.is_dir: a name may be too long.
    parser.error(f"--workdir={workdir} must be a folder of runs")
  kept = collect(workdir)
  if not kept:
    parser.error(f"--workdir={workdir} must hold a finished run")
  # Before anything is written: these may be another experiment's runs.
  drawn, rows = draw(kept), table(kept)
  files_lib.write_json(raw_file, kept)
  drawn.savefig(raw_file.with_name(figure), dpi=110)
  markdown.update(raw_file.with_name("README.md"), name, command, rows)
