"""Runs a sweep: a base configuration and a grid of overrides, on Ray.

  python -m experiments.sweep --sweep=experiments/depth_ablation/degradation.py
    --workdir=DIR [--dry_run] [--measured=DIR ...] [--cpus_per_cell=2]
    [--gpus_per_cell=1] [--retries=3] [--address=HOST:6379]

Every cell is a separate run of `resnet_flax.main` in DIR/NAME, with its output
in DIR/NAME.log. The same command skips finished cells and resumes the others.
`experiments/tools/sweep/definition.py` describes the sweep file.
"""

import os

from absl import flags

from resnet_flax.run import (
  command_line,
  errors,
  folder,
  process,
  surroundings,
)

flags.adopt_module_key_flags(process)
_SWEEP = flags.DEFINE_string("sweep", "", "The sweep file.")
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "List the cells and their costs; run nothing."
)
flags.DEFINE_alias("dry-run", "dry_run")
_MEASURED = flags.DEFINE_multi_string(
  "measured",
  [],
  "Workdir of a run of a similar network on such a machine. --dry_run uses its"
  " FLOP/s and the FLOP/s of started cells. The flag can be repeated. Without"
  " any FLOP/s, --dry_run times some steps here.",
)
_CPUS = flags.DEFINE_integer(
  "cpus_per_cell",
  None,
  "Cores of a cell; as many cells run at once as have cores. The default is the"
  " sweep file's CPUS_PER_CELL, else all cores of a machine, or a GPU's share"
  " of them.",
  lower_bound=1,
)
_GPUS = flags.DEFINE_integer(
  "gpus_per_cell",
  None,
  "GPUs of a cell. The default is the sweep file's GPUS_PER_CELL, else one if"
  " a machine has GPUs.",
  lower_bound=0,
)
_RETRIES = flags.DEFINE_integer(
  "retries",
  3,
  "Number of restarts of a cell whose process or machine dies. The cell resumes"
  " from its checkpoint.",
  lower_bound=0,
)
_ADDRESS = flags.DEFINE_string(
  "address",
  "",
  "A Ray cluster, for example 10.0.0.1:6379. All its machines must have this"
  " folder, the Python environment and --workdir under the same paths, on a"
  " shared file system. The default is this machine alone.",
)


def main(argv: list[str]) -> None:
  """Runs the cells that have not finished, or lists all."""
  del argv
  import jax

  from experiments.tools.sweep import definition, estimate, overview, scheduler

  surroundings.set_up()
  if not _DRY_RUN.value:
    # The cells need the devices, so this process must not take them.
    jax.config.update("jax_platforms", "cpu")
  if command_line.CONFIG.value:
    raise errors.ConfigError(
      "--config must not be set: the sweep file names it. Pass --sweep=FILE."
    )
  if not _SWEEP.value or not process.WORKDIR.value:
    raise errors.ConfigError(
      "--sweep and --workdir must be set. Pass --sweep=FILE, for example"
      " experiments/depth_ablation/degradation.py, and --workdir=DIR for the"
      " cells."
    )
  workdir = errors.local_path(process.WORKDIR.value, "--workdir").absolute()
  sweep = definition.load(
    str(errors.local_path(_SWEEP.value, "--sweep")),
    workdir,
    definition.Resources(_CPUS.value, _GPUS.value),
  )
  if _DRY_RUN.value:
    measured = [
      errors.local_path(each, "--measured") for each in _MEASURED.value
    ]
    gpus = sweep.resources.gpus or 1
    surroundings.show(estimate.table(sweep.cells, measured, gpus))
    return
  if os.path.exists(workdir / "config.json"):
    raise errors.WorkdirError(
      f"workdir {workdir} holds a run, not a sweep. Pass another --workdir."
    )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.WorkdirError(
      f"workdir {workdir} cannot be written: {error.strerror}. Pass another"
      " one with --workdir."
    ) from error
  with folder.exclusive(workdir):
    statuses, reasons = scheduler.run(sweep, _ADDRESS.value, _RETRIES.value)
  surroundings.show(overview.table(statuses))
  for name, reason in reasons.items():
    surroundings.show(f"{name} failed: {reason}")
  surroundings.show(overview.summary(statuses.values()))
  if reasons:
    raise errors.UserError(
      f"{len(reasons)} of {len(statuses)} cells failed; their messages are in"
      f" {workdir}/NAME.log. The same command tries them again."
    )


if __name__ == "__main__":
  process.run(main, command_line.parse_flags)
