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

# Seconds between looks at where the cells stand.
_INTERVAL = 1.0
# Nothing is passed through Ray's memory; this is the least that it takes.
_OBJECT_STORE_BYTES = 80 * 2**20


@contextlib.contextmanager
def connect(address: str) -> Iterator[Any]:
  """Starts Ray on this machine, or connects to a cluster; stops it at the end.

  Args:
    address: of a cluster; '' for this machine alone.

  Yields:
    The module `ray`.

  Raises:
    UserError: Ray is not installed, or the cluster cannot be reached.
  """
  os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
  # Cells are the work; by default Ray's workers yield to everything else.
  os.environ.setdefault("RAY_worker_niceness", "0")
  # What Ray is about to change for tasks without GPUs is decided in `task`.
  os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
  try:
    import ray
  except ImportError as error:
    raise errors.UserError(
      "sweeps need Ray, which is not installed: pip install -c constraints.txt"
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
    # Ray's own way with SIGTERM.
    raise signals_lib.Stopped(signal.SIGTERM) from None
  # Among others a plain Exception where the machine is too busy to start it.
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
  """CPUs and GPUs of a cell on the machines that are up; `choose_resources`."""
  nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
  return choose_resources(wanted, nodes)


def choose_resources(
  wanted: Resources, nodes: Sequence[dict[str, float]]
) -> tuple[int, int]:
  """What each cell gets.

  Args:
    wanted: what was asked for.
    nodes: for each machine how many 'CPU' and 'GPU' it has, which lack where
      there is none.

  Returns:
    CPUs and GPUs of a cell.

  Raises:
    ConfigError: no machine has so many.
  """
  sizes = [(int(n.get("CPU", 0)), int(n.get("GPU", 0))) for n in nodes]
  gpus = wanted.gpus
  if gpus is None:
    gpus = int(any(node_gpus for _, node_gpus in sizes))
  able = [size for size in sizes if size[0] >= 1 and size[1] >= gpus]
  cpus = wanted.cpus
  if cpus is None:
    # So that a cell fits on every machine that has the GPUs for it.
    shares = [c // (g // gpus if gpus else 1) for c, g in able]
    cpus = max(1, min(shares, default=1))
  if not any(size[0] >= cpus for size in able):
    raise errors.ConfigError(
      f"cpus_per_cell={cpus}, gpus_per_cell={gpus}: no machine has so many;"
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
  """Runs all cells that are not finished, and waits for them.

  Args:
    ray: from `connect`.
    cells: checked ones; their workdirs' folder exists.
    resources: CPUs and GPUs of a cell.
    retries: how many times a cell that dies is started again.
    overview: is shown where the cells stand, every second.

  Returns:
    Where each cell stands at last, and why those failed that did; by name.

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
        "stopped at once; what the cells saved is good, and the same command"
        " resumes from it."
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
        if signals.requested and not stopping:
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
  """How a task ended; the reason is '' where the cell's log has it."""
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
