"""Many hosts: processes find one another, agree, and process 0 writes.

All processes must take part in every computation, so they decide together when
to save and to stop. Only process 0 reads and writes the workdir; it sends the
content to the others. With a single process no function waits for others.
"""

import contextlib
import ctypes
import functools
import itertools
import json
import logging
import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from resnet_flax.parallel import mesh as mesh_lib
from resnet_flax.run import errors, signals as signals_lib

_logger = logging.getLogger(__name__)

PyTree = Any
T = TypeVar("T")

# Seconds that a failing process waits for the others to fail as well.
_LEAVE = 15
# Seconds to wait for others: process 0 may download data for all.
_PATIENCE = 24 * 3600

_HOW = (
  "pass --coordinator_address=HOST:PORT (process 0's), --num_processes=N and"
  " --process_id=I (0 to N-1) to every process; or --num_processes=1 to work"
  " alone"
)
_LOST = (
  "this process cannot continue: most likely another process of the run has"
  " ended or cannot be reached; see its messages. Saved checkpoints are"
  " good: start the same command in all processes again to resume."
)
# Errors that begin with these are not caused by other processes.
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")

# Numbers the exchanges: all processes make the same ones in the same order.
_numbers = itertools.count()


# ---- Finding one another


class Cluster(NamedTuple):
  """Arguments of `jax.distributed.initialize`; JAX detects those left None."""

  num_processes: int
  process_id: int | None = None  # From 0.
  coordinator_address: str | None = None  # HOST:PORT of process 0.
  cluster_detection_method: str | None = None


# Launchers that JAX knows: the environment variable with the number of
# processes, one that JAX needs, and JAX's detection method if it must be named.
_LAUNCHERS = (
  ("OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri", None),  # Open MPI 4.
  # A batch script is a single process and lacks the list of nodes.
  ("SLURM_NTASKS", "SLURM_STEP_NODELIST", None),
  ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "mpi4py"),
  ("PMI_SIZE", "PMI_SIZE", "mpi4py"),  # Other kinds of MPI.
)


def find_cluster(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Cluster | None:
  """Finds the processes of this run; None if this process is the only one.

  Missing arguments come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID, else from the launcher: TPU pods, Slurm, Open MPI 4 and, with
  mpi4py, any other MPI. If all three are given, a process takes all devices of
  its host, or those in JAX_LOCAL_DEVICE_IDS.
  """
  address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
  count = _integer("JAX_NUM_PROCESSES", num_processes)
  index = _integer("JAX_PROCESS_ID", process_id)
  detection: str | None = "deactivate"
  if count != 1 and (not address or None in (count, index)):
    size, detection = _launched()
    count = size if count is None else count
  arguments = {
    "coordinator_address": address or None,
    "num_processes": count,
    "process_id": index,
  }
  missing = [name for name, value in arguments.items() if value is None]
  if len(missing) == len(arguments) or (count == 1 and not index):
    return None
  if count is None or (missing and detection == "deactivate"):
    raise errors.ConfigError(f"{' and '.join(missing)} not given: {_HOW}.")
  if not 0 <= (index or 0) < count:
    raise errors.ConfigError(
      f"process_id={index} with num_processes={count} must be from 0 to"
      " num_processes - 1, and different in every process."
    )
  host, _, port = (address or "detected:1").rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise errors.ConfigError(
      f"coordinator_address={address!r} must be HOST:PORT, for example"
      " 10.0.0.1:8476."
    )
  return Cluster(count, index, address or None, detection)


def _launched() -> tuple[int | None, str | None]:
  """The launcher's number of processes, and JAX's detection method."""
  for size_name, needed, detection in _LAUNCHERS:
    size = _integer(size_name)
    if size and needed in os.environ:
      if detection == "mpi4py" and size > 1:
        _check_mpi4py(size)
      return size, detection
  hosts = _tpu_hosts()
  return hosts, None if hosts else "deactivate"


def _integer(variable: str, given: int | None = None) -> int | None:
  """The given number, else an environment variable's value."""
  value = os.environ.get(variable)
  if given is not None or not value:
    return given
  if not value.isdecimal():
    raise errors.ConfigError(f"{variable}={value!r} must be an integer >= 0.")
  return int(value)


def _check_mpi4py(size: int) -> None:
  try:
    from mpi4py import MPI

    found = f"{MPI.COMM_WORLD.Get_size()} processes"
  # mpi4py loads an MPI library, which may be missing.
  except Exception as error:
    found = errors.one_line(error)
  if found != f"{size} processes":
    raise errors.ConfigError(
      f"MPI has started {size} processes, but mpi4py finds {found}: pip install"
      f" mpi4py, built with this MPI; or {_HOW}."
    )


def _tpu_hosts() -> int | None:
  """The number of hosts of this run's TPU slices; None without TPUs."""
  get = os.environ.get
  if get("TPU_ML_PLATFORM") is None:  # JAX, once imported, sets it for TPUs.
    return None
  hosts = get("TPU_PROCESS_ADDRESSES") or get("TPU_WORKER_HOSTNAMES")
  slices = get("MEGASCALE_NUM_SLICES")
  if not hosts and get("TPU_SKIP_MDS_QUERY") is None:
    hosts = _tpu_metadata("worker-network-endpoints")
    pattern = r"MEGASCALE_NUM_SLICES: *'?(\d+)"
    if not slices and (match := re.search(pattern, _tpu_metadata("tpu-env"))):
      slices = match[1]
  return (hosts.count(",") + 1) * int(slices or 1) if hosts else None


def _tpu_metadata(name: str) -> str:
  """An attribute of this TPU VM from the cloud; '' if there is no answer."""
  import requests

  server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
  try:
    answer = requests.get(url, headers={"Metadata-Flavor": "Google"}, timeout=5)
    return answer.text if answer.ok else ""
  except requests.RequestException as error:
    _logger.warning(
      "warning: the cloud does not tell the hosts of this TPU VM (%s). If there"
      " are several, %s.",
      errors.one_line(error),
      _HOW,
    )
    return ""


# ---- Connecting


@contextlib.contextmanager
def connected(
  cluster: Cluster | None, *, timeout: int = 300, heartbeat_timeout: int = 60
) -> Iterator[None]:
  """Connects the processes of a run while entered; they end together.

  Must be entered before JAX is asked for its devices; without a cluster it does
  nothing. All processes must connect within `timeout` seconds. If process 0
  dies, this one ends at once; if another dies, within `heartbeat_timeout`
  seconds. Either way it prints one line. Raises `ConfigError` if JAX refuses to
  connect, and `UserError` if a computation fails for lack of a process.
  """
  if cluster is None:
    yield
    return
  count = cluster.num_processes
  address = cluster.coordinator_address or "(as JAX detects it)"
  _logger.info(
    "waiting for num_processes=%d at coordinator_address=%s", count, address
  )
  # The service would take SIGTERM from `StopSignals` and ignore Ctrl-C.
  jax.config.update("jax_enable_preemption_service", False)
  # `exits`: Python itself handles no signal while the runtime waits.
  stops = signals_lib.StopSignals(exits=True)
  with _quiet_stderr() as stderr, stops:

    def stopped() -> str:
      os.dup2(stderr, 2)
      return "stopped while the processes of the run were connecting."

    stops.exit_message = stopped
    # The runtime aborts this process if the others do not connect.
    _say_on_abort(
      f"not all of num_processes={count} processes connected to"
      f" coordinator_address={address} within {timeout} s"
      " (--initialization_timeout). Check that process 0 runs, that its host"
      " and port can be reached from here, and that all processes have the same"
      " --coordinator_address and --num_processes.",
      stderr,
      errors.ConfigError.exit_code,
    )
    try:
      jax.distributed.initialize(
        **cluster._asdict(),
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=_LEAVE,
      )
    # JAX, its runtime and cloud libraries raise many kinds of exceptions.
    except Exception as error:
      raise errors.ConfigError(
        f"coordinator_address={address} cannot be used:"
        f" {errors.one_line(error)}. Try another --coordinator_address, for"
        f" example another port; or {_HOW}."
      ) from None
  _say_on_abort(_LOST, os.dup(2), 1)
  try:
    if not is_first():
      # Process 0 logs for all.
      logging.getLogger("resnet_flax").setLevel(logging.WARNING)
    yield
  except jax.errors.JaxRuntimeError as error:
    if str(error).startswith(_OWN_FAULTS):
      raise
    # A computation fails if a process that takes part in it has ended.
    raise errors.UserError(f"{_LOST} ({errors.one_line(error)})") from error
  except (errors.UserError, signals_lib.Stopped):
    # If all stop, process 0 may take long to save. If only this one stops, the
    # others continue and may never leave.
    _leave(_PATIENCE if Agreement.has_stopped else _LEAVE)
    raise
  _leave(_PATIENCE)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[int]:
  """Discards standard error while entered; yields the real descriptor."""
  saved = os.dup(2)
  with open(os.devnull, "wb") as null:
    os.dup2(null.fileno(), 2)
  try:
    yield saved
  finally:
    os.dup2(saved, 2)


_on_abort: Any = None


def _say_on_abort(message: str, stderr: int, exit_code: int) -> None:
  """Sets the message and the exit code for an abort by JAX's runtime."""
  global _on_abort  # C may call it later, so it must not be collected.
  line = f"error: {message}\n".encode()

  def end(number: int) -> NoReturn:
    del number
    os.write(stderr, line)
    os._exit(exit_code)

  # When another process dies, the runtime aborts in one of its threads. Its
  # callback for Python fails in a C++ cast, and a Python signal handler would
  # run too late.
  _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
  ctypes.CDLL(None).signal(int(signal.SIGABRT), _on_abort)


def _leave(seconds: int) -> None:
  """Disconnects together with the others if they end within `seconds`."""
  # A process that disconnects alone seems dead: process 0 to the others, and
  # any other to process 0 while it saves.
  try:
    _client().wait_at_barrier("resnet_flax/leave", seconds * 1000)
  except Exception:
    return  # The others still work: this process ends alone.
  jax.distributed.shutdown()


# ---- Agreeing


def _client() -> Any:
  """The runtime's client, which can wait long for values and at barriers."""
  # Public functions of `multihost_utils` run computations instead; see `meet`.
  return multihost_utils.distributed.global_state.client


def _wait_for(key: str) -> Any:
  """Waits for a value that a process sets as JSON, and parses it."""
  return json.loads(_client().blocking_key_value_get(key, _PATIENCE * 1000))


def is_first() -> bool:
  """Whether this is process 0, which alone reads and writes the workdir."""
  return jax.process_index() == 0


def on_first(function: Callable[[], T]) -> T:
  """Calls a function in process 0; all get its JSON result or its UserError."""
  if jax.process_count() == 1:
    return function()
  key = f"resnet_flax/first/{next(_numbers)}"
  if not is_first():
    answer = _wait_for(key)
    if "error" in answer:
      raise getattr(errors, answer["error"])(answer["message"])
    return answer["value"]
  try:
    value = function()
  except errors.UserError as error:
    # A module's own kind of error is sent as its base class in `errors`.
    kinds = [kind.__name__ for kind in type(error).__mro__]
    kind = next(name for name in kinds if hasattr(errors, name))
    answer = {"error": kind, "message": str(error)}
    _client().key_value_set(key, json.dumps(answer))
    raise
  _client().key_value_set(key, json.dumps({"value": value}))
  return value


def on_first_only(function: Callable[[], T]) -> T | None:
  """As `on_first`, for results that are not JSON; other processes get None."""
  results: list[T] = []
  on_first(lambda: results.append(function()))
  return results[0] if results else None


def on_first_then_others(function: Callable[[], T]) -> T:
  """Calls a function in process 0, then in the others.

  If it raises a `UserError` in process 0, all processes raise this error.
  """
  results = on_first_only(lambda: [function()])
  return results[0] if results else function()


def check_same(name: str, values: dict[str, Any]) -> None:
  """Raises a `ConfigError` in all processes if their JSON values differ."""
  if jax.process_count() == 1:
    return
  prefix = f"resnet_flax/same/{next(_numbers)}"
  content = json.dumps(values, sort_keys=True)
  _client().key_value_set(f"{prefix}/{jax.process_index()}", content)

  def compare() -> None:
    own_values = json.loads(content)  # Lists for tuples, as the others have.
    for process in range(1, jax.process_count()):
      other_values = _wait_for(f"{prefix}/{process}")
      text = "{} ({!r} in process 0, {!r} there)"
      if differing := errors.differences(own_values, other_values, text):
        raise errors.ConfigError(
          f"{name} of process {process} differs from process 0's:"
          f" {', '.join(differing)}. Start all processes with the same command,"
          " except for --process_id."
        )

  on_first(compare)


def meet() -> None:
  """Waits until all processes have called this function.

  On CPUs the first common computation connects the processes; it fails after
  half a minute. Call this function before it if processes may be late.
  """
  if jax.process_count() > 1:
    key = f"resnet_flax/meet/{next(_numbers)}"
    _client().wait_at_barrier(key, _PATIENCE * 1000)


def from_first(function: Callable[[], T], like: Callable[[], PyTree]) -> T:
  """Sends process 0's arrays to all, bit-identical; `like()` has the shapes."""
  if jax.process_count() == 1:
    return function()
  tree = function() if is_first() else like()
  leaves = jax.tree.leaves(tree)
  sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
  data = [np.asarray(leaf).tobytes() for leaf in leaves] if is_first() else []
  # One vector, since a program of many arrays compiles slowly. Integers, since
  # a sum of floats loses the sign of a zero.
  content = b"".join(data).ljust(-(-sum(sizes) // 4) * 4, b"\0")
  words = np.frombuffer(content, np.uint32)
  meet()
  shared = multihost_utils.broadcast_one_to_all(words)
  parts = iter(np.split(shared.view(np.uint8), np.cumsum(sizes)))
  return jax.tree.map(
    lambda leaf: np.frombuffer(next(parts), leaf.dtype).reshape(leaf.shape),
    tree,
  )


class Agreement:
  """Decides when to save and to stop, at the same step in all processes.

  Signals and clocks differ between processes, so the processes vote. After
  every call of the step or of evaluation, each says which signal has come and
  whether a save is overdue. A vote is a computation on all devices. It is read
  one vote later, unless `check` must know at once.
  """

  has_stopped = False  # Whether the processes have agreed to stop.

  def __init__(
    self,
    signals: signals_lib.StopSignals,
    overdue: Callable[[], bool],
    devices: Sequence[jax.Device],
  ):
    self._signals, self._overdue = signals, overdue
    self._pending: jax.Array | None = None
    mesh = mesh_lib.create_mesh(devices)
    divided = mesh_lib.sharding(mesh, mesh_lib.DATA)
    everywhere = mesh_lib.sharding(mesh)
    self._count = jax.jit(lambda votes: votes.max(0), out_shardings=everywhere)
    # Cached, since votes are nearly always the same.
    self._put = functools.cache(
      lambda *vote: jax.make_array_from_callback(
        (len(devices), 2), divided, lambda _: np.asarray([vote], np.int32)
      )
    )

  def wants_save(self) -> bool:
    """Whether to save after this call; all processes must ask at each call."""
    return any(self._vote())

  def check(self, *, at_once: bool = True) -> None:
    """Raises `Stopped` if any process has had a signal.

    Several processes raise it one vote late if not `at_once`.
    """
    signal_number, _ = self._vote(at_once)
    if signal_number:
      Agreement.has_stopped = True
      raise signals_lib.Stopped(signal_number)

  def _vote(self, at_once: bool = False) -> Sequence[int]:
    """The agreed signal, and 1 for a save; a vote late if not `at_once`."""
    vote = self._signals.number or 0, int(self._overdue())
    if jax.process_count() == 1:
      return vote
    pending, self._pending = self._pending, self._count(self._put(*vote))
    if at_once:
      pending, self._pending = self._pending, None
    return (0, 0) if pending is None else np.asarray(pending).tolist()
