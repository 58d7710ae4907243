"""Runs a sweep: a base configuration and a grid of overrides, on Ray.

  python -m experiments.sweep --sweep=experiments/depth_ablation/sweep.py
    --workdir=DIR [--dry_run] [--measured=DIR ...] [--cpus_per_cell=2]
    [--gpus_per_cell=1] [--retries=3] [--address=HOST:6379]

Every cell is a run of its own in DIR/NAME, by `resnet_flax.main`, with its
output in DIR/NAME.log. The same command again skips what is finished and goes
on with the rest. `experiments/sweep/definition.py` says what a sweep file is.
"""

import contextlib
import pathlib
from collections.abc import Iterator

from absl import flags

from resnet_flax.run import errors, folder, process, surroundings

flags.adopt_module_key_flags(process)
_SWEEP = flags.DEFINE_string("sweep", "", "The sweep file.")
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "List the cells and what they will cost; run nothing."
)
flags.DEFINE_alias("dry-run", "dry_run")
_MEASURED = flags.DEFINE_multi_string(
  "measured",
  [],
  "Workdir of a run of a similar network on such a machine, whose FLOP/s"
  " --dry_run estimates with, besides those of cells that have begun; can be"
  " given several times. By default some steps are timed here.",
)
_CPUS = flags.DEFINE_integer(
  "cpus_per_cell",
  None,
  "Cores of a cell; as many cells run at once as there are cores for. By"
  " default the sweep file's CPUS_PER_CELL, else all cores of a machine, or a"
  " GPU's share of them.",
  lower_bound=1,
)
_GPUS = flags.DEFINE_integer(
  "gpus_per_cell",
  None,
  "GPUs of a cell. By default the sweep file's GPUS_PER_CELL, else one where"
  " there are any.",
  lower_bound=0,
)
_RETRIES = flags.DEFINE_integer(
  "retries",
  3,
  "How often a cell is started again whose process or machine dies; it goes on"
  " from its checkpoint.",
  lower_bound=0,
)
_ADDRESS = flags.DEFINE_string(
  "address",
  "",
  "A Ray cluster, for example 10.0.0.1:6379. All its machines must have this"
  " folder, the Python environment and --workdir under the same paths, on a"
  " file system that all of them see. By default this machine alone.",
)


def _run(argv: list[str]) -> None:
  del argv
  import jax

  from experiments.tools.sweep import definition, estimate, overview, scheduler
  from resnet_flax.run import command_line

  surroundings.set_up()
  if not _DRY_RUN.value:
    # The devices are the cells'.
    jax.config.update("jax_platforms", "cpu")
  if command_line.CONFIG.value:
    raise errors.ConfigError(
      "--config: a sweep file names its config. Pass --sweep=FILE instead."
    )
  if not _SWEEP.value or not process.WORKDIR.value:
    raise errors.ConfigError(
      "pass --sweep=FILE, for example experiments/depth_ablation/sweep.py,"
      " and --workdir=DIR, which gets a folder for each cell."
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
  finished = [overview.is_finished(cell) for cell in sweep.cells]
  with _use(workdir):
    if all(finished):
      observer = overview.Observer(sweep.cells)
      statuses = {
        cell.name: observer.status(cell, overview.State.FINISHED)
        for cell in sweep.cells
      }
      reasons: dict[str, str] = {}
    else:
      with scheduler.connect(_ADDRESS.value) as ray:
        statuses, reasons = scheduler.run(
          ray,
          sweep.cells,
          scheduler.resources_of_cell(ray, sweep.resources),
          _RETRIES.value,
          overview.Overview(),
        )
  surroundings.show(overview.table(statuses))
  for name, reason in reasons.items():
    surroundings.show(f"{name} failed: {reason}")
  surroundings.show(overview.summary(statuses.values()))
  if reasons:
    raise errors.UserError(
      f"{len(reasons)} of {len(statuses)} cells failed; each has its messages"
      f" in {workdir}/NAME.log. The same command tries them again."
    )


@contextlib.contextmanager
def _use(workdir: pathlib.Path) -> Iterator[None]:
  """Makes the sweep's folder and keeps other sweeps out of it."""
  if (workdir / "config.json").exists():
    raise errors.WorkdirError(
      f"workdir {workdir} is that of a run, not of a sweep. Pass another"
      " --workdir."
    )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.WorkdirError(
      f"workdir {workdir} cannot be written: {error.strerror}. Pass another"
      " one with --workdir."
    ) from error
  with folder.exclusive(workdir):
    yield


def main() -> None:
  """Runs the command line; mistakes and signals end in one line."""
  process.run(_run)


if __name__ == "__main__":
  main()
