"""Runs the cells of a sweep on Ray."""

import contextlib
import logging
import os
import pathlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.tools.sweep import overview as overview_lib, task
from experiments.tools.sweep.definition import Cell, Resources
from experiments.tools.sweep.overview import State, Status
from resnet_flax.run import environment, errors, signals as signals_lib

# Seconds between two readings of the cells' progress.
_INTERVAL = 1.0
# Cells pass nothing through Ray's memory; this is Ray's minimum.
_OBJECT_STORE_BYTES = 80 * 2**20


@contextlib.contextmanager
def connect(address: str) -> Iterator[Any]:
  """Starts Ray on this machine, or connects to a cluster; stops it at the end.

  Args:
    address: address of a cluster; '' for this machine alone.

  Yields:
    The module `ray`.

  Raises:
    UserError: Ray is not installed, or the cluster cannot be reached.
  """
  os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
  # By default Ray's workers yield to all other processes; cells must not.
  os.environ.setdefault("RAY_worker_niceness", "0")
  # Ray will change its default for tasks without GPUs; `task` sets it instead.
  os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
  try:
    import ray
  except ImportError as error:
    raise errors.UserError(
      "Ray must be installed to run sweeps: pip install -c constraints.txt"
      " -e '.[sweep]'"
    ) from error
  local: dict[str, Any] = {
    "num_cpus": environment.num_cpu_threads(),
    "include_dashboard": False,
    "object_store_memory": _OBJECT_STORE_BYTES,
  }
  handler = signal.getsignal(signal.SIGTERM)
  try:
    ray.init(
      address=address or "local",
      log_to_driver=False,
      logging_level=logging.ERROR,
      **({} if address else local),
    )
  except SystemExit:
    # Ray raises this on SIGTERM.
    raise signals_lib.Stopped(signal.SIGTERM) from None
  # Ray raises a plain Exception if the machine is too busy to start it.
  except Exception as error:
    where = f"--address={address}" if address else "Ray on this machine"
    raise errors.UserError(
      f"{where} cannot be used: {errors.one_line(error)}"
    ) from error
  finally:
    signal.signal(signal.SIGTERM, handler)
  try:
    yield ray
  finally:
    ray.shutdown()


def resources_of_cell(ray: Any, wanted: Resources) -> tuple[int, int]:
  """Runs `choose_resources` for the machines that are up."""
  nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
  return choose_resources(wanted, nodes)


def choose_resources(
  wanted: Resources, nodes: Sequence[dict[str, float]]
) -> tuple[int, int]:
  """Chooses the resources of each cell.

  Args:
    wanted: the requested resources.
    nodes: each machine's numbers of 'CPU' and 'GPU'; a key is missing if the
      machine has none.

  Returns:
    CPUs and GPUs of a cell.

  Raises:
    ConfigError: no machine has enough CPUs and GPUs.
  """
  sizes = [(int(n.get("CPU", 0)), int(n.get("GPU", 0))) for n in nodes]
  gpus = wanted.gpus
  if gpus is None:
    gpus = int(any(node_gpus for _, node_gpus in sizes))
  able = [size for size in sizes if size[0] >= 1 and size[1] >= gpus]
  cpus = wanted.cpus
  if cpus is None:
    # The smallest share fits on every machine with enough GPUs.
    shares = [c // (g // gpus if gpus else 1) for c, g in able]
    cpus = max(1, min(shares, default=1))
  if not any(size[0] >= cpus for size in able):
    raise errors.ConfigError(
      f"--cpus_per_cell={cpus} --gpus_per_cell={gpus} must fit on a machine;"
      " there are "
      + ", ".join(f"one of {c} CPUs and {g} GPUs" for c, g in sizes)
      + "."
    )
  return cpus, gpus


def run(
  ray: Any,
  cells: Sequence[Cell],
  resources: tuple[int, int],
  retries: int,
  overview: overview_lib.Overview,
) -> tuple[dict[str, Status], dict[str, str]]:
  """Runs all unfinished cells and waits for them.

  Args:
    ray: from `connect`.
    cells: checked cells; the parent of their workdirs exists.
    resources: CPUs and GPUs of a cell.
    retries: number of restarts of a cell that dies.
    overview: shows the cells' progress every second.

  Returns:
    The final status of each cell, and the reason of each failure, by name.

  Raises:
    Interrupted: SIGINT or SIGTERM. The cells have saved and ended.
  """
  observer = overview_lib.Observer(cells)
  statuses = {cell.name: observer.status(cell, None) for cell in cells}
  reasons: dict[str, str] = {}
  running: dict[Any, Cell] = {}

  with signals_lib.StopSignals(exits=True) as signals, signals.hold():
    signals.say_on_exit(
      lambda: (
        "stopped at once; the cells' checkpoints are good, and the same command"
        " resumes from them."
      )
    )
    cpus, gpus = resources
    remote = ray.remote(task.run)
    options = {
      "num_cpus": cpus,
      "num_gpus": gpus,
      "max_retries": retries,
      "retry_exceptions": [task.Died],
    }
    for cell in cells:
      if overview_lib.is_finished(cell):
        statuses[cell.name] = observer.status(cell, State.FINISHED)
        continue
      reference = remote.options(name=cell.name, **options).remote(
        cell.arguments, cell.workdir, cell.log, pathlib.Path.cwd(), cpus, gpus
      )
      running[reference] = cell
    stopping = False
    with overview:
      while running:
        if signals.number and not stopping:
          stopping = True
          for reference in running:
            ray.cancel(reference)
        done, _ = ray.wait(list(running), timeout=_INTERVAL)
        for reference in done:
          cell = running.pop(reference)
          state, reason = _outcome(ray, reference, stopping)
          statuses[cell.name] = observer.status(cell, state)
          if state is State.FAILED:
            reasons[cell.name] = reason or observer.last_line(cell)
        for cell in running.values():
          statuses[cell.name] = observer.status(cell, None)
        overview.show(statuses)
    try:
      signals.check()
    except signals_lib.Stopped as stopped:
      raise errors.Interrupted(
        f"stopped by {stopped}; {overview_lib.summary(statuses.values())}."
        " The same command resumes from there.",
        stopped.number,
      ) from None
  return statuses, reasons


def _outcome(ray: Any, reference: Any, stopping: bool) -> tuple[State, str]:
  """Returns a task's final state and reason; '' if the cell's log has it."""
  try:
    code = ray.get(reference)
  except ray.exceptions.TaskCancelledError:
    return State.STOPPED, ""
  except ray.exceptions.RayTaskError as error:
    died = isinstance(error.cause, task.Died)
    reason = str(error.cause) if died else errors.one_line(error.cause)
  except ray.exceptions.RayError as error:
    reason = errors.one_line(error)
  else:
    if code == 0:
      return State.FINISHED, ""
    if not stopping:
      return State.FAILED, ""
    reason = ""
  return (State.STOPPED if stopping else State.FAILED), reason
