"""Writes a report of runs: one page with figures and tables, and their files.

python -m resnet_flax.report FOLDER... --out=FOLDER

A FOLDER is the workdir of a run, or one that workdirs lie in.
"""

import functools
import sys

from absl import flags

from resnet_flax.run import errors, process, surroundings

_OUT = flags.DEFINE_string(
  "out",
  "",
  "Folder of the report; of what it holds, only files of the same names are"
  " replaced.",
)
_CHECKPOINTS = flags.DEFINE_enum(
  "checkpoints",
  "best",
  ["best", "each", "none"],
  "Whose best checkpoint is scored on the test images, for the accuracy of each"
  " class, the confusion matrix and the mistakes. best: that of the best group"
  " of each data set. each: that of each group. none: none.",
)


def _run(folders: list[str], argv: list[str]) -> None:
  del argv
  from resnet_flax.run import command_line, signals

  surroundings.set_up()
  if not folders:
    raise errors.ConfigError(
      "no runs: pass their workdirs, or a folder that they lie in, for example"
      " python -m resnet_flax.report runs --out=report."
    )
  if not _OUT.value:
    raise errors.ConfigError(
      "no --out: pass the report's folder, for example --out=report."
    )
  if process.WORKDIR.value or command_line.CONFIG.value:
    raise errors.ConfigError(
      "--workdir and --config are not for reports: pass the workdirs by"
      " themselves, without a flag."
    )
  try:
    from resnet_flax.tools.report import report
  except ModuleNotFoundError as error:
    raise errors.ConfigError(
      f"a report needs {error.name}, which is not installed: pip install"
      " 'resnet_flax[report]'."
    ) from error
  # What is half written is removed before the process ends.
  with signals.StopSignals():
    done = report.make(folders, _OUT.value, _CHECKPOINTS.value)
  surroundings.show(f"Runs: {done.num_runs}\nGroups: {done.num_groups}")
  surroundings.show(f"Page: {done.page}")


def run() -> None:
  """Runs the command line; mistakes and signals end in one line."""
  # Every other command line refuses what is no flag; here it names a folder.
  folders = [a for a in sys.argv[1:] if not a.startswith("-")]
  sys.argv[1:] = [a for a in sys.argv[1:] if a.startswith("-")]
  process.run(functools.partial(_run, folders))
