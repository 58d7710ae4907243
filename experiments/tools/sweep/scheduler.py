"""Runs the cells of a sweep on Ray."""

import contextlib
import logging
import os
import pathlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.tools.sweep import overview as overview_lib, task
from experiments.tools.sweep.definition import Cell, Resources, Sweep
from experiments.tools.sweep.overview import State, Status
from resnet_flax.run import environment, errors, signals as signals_lib

# Seconds between two readings of the cells' progress.
_INTERVAL = 1.0
# Cells pass nothing through Ray's memory; this is Ray's minimum.
_OBJECT_STORE_BYTES = 80 * 2**20


@contextlib.contextmanager
def connect(address: str) -> Iterator[Any]:
  """Yields the module `ray`, connected to a cluster, or to this machine if ''.

  Raises `UserError` if Ray is not installed or the cluster cannot be reached.
  """
  os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
  # By default Ray's workers yield to all other processes; cells must not.
  os.environ.setdefault("RAY_worker_niceness", "0")
  # `task` hides the GPUs from cells without GPUs; Ray's default will change.
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


def choose_resources(
  wanted: Resources, nodes: Sequence[dict[str, float]]
) -> tuple[int, int]:
  """Chooses the CPUs and GPUs of each cell.

  `nodes` has each machine's numbers of 'CPU' and 'GPU'; a key is missing if the
  machine has none. Raises `ConfigError` if no machine has enough of both.
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
  sweep: Sweep, address: str, retries: int
) -> tuple[dict[str, Status], dict[str, str]]:
  """Runs all unfinished cells and waits for them.

  A cell that dies is started again up to `retries` times. Gives the final
  status of each cell, and the reason of each failure, by name. Raises
  `Interrupted` after SIGINT or SIGTERM: the cells have saved and ended.
  """
  observer = overview_lib.Observer(sweep.cells)
  statuses, unfinished = {}, []
  for cell in sweep.cells:
    ended = State.FINISHED if overview_lib.is_finished(cell) else None
    statuses[cell.name] = observer.status(cell, ended)
    if not ended:
      unfinished.append(cell)
  reasons: dict[str, str] = {}
  if not unfinished:
    return statuses, reasons
  running: dict[Any, Cell] = {}
  with (
    connect(address) as ray,
    signals_lib.StopSignals(exits=True) as signals,
    signals.hold(),
  ):
    signals.exit_message = lambda: (
      "stopped at once; the cells' checkpoints are good, and the same command"
      " resumes from them."
    )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = choose_resources(sweep.resources, nodes)
    remote = ray.remote(
      num_cpus=cpus,
      num_gpus=gpus,
      max_retries=retries,
      retry_exceptions=[task.Died],
    )(task.run)
    for cell in unfinished:
      reference = remote.options(name=cell.name).remote(
        cell.arguments, cell.workdir, cell.log, pathlib.Path.cwd(), cpus, gpus
      )
      running[reference] = cell
    stopping = False
    with overview_lib.Overview() as overview:
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
