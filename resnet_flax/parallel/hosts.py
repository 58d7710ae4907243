"""Many hosts: how their processes find one another, agree, and who writes.

One program runs in every process, each with some of the devices, on JAX's
distributed runtime. All must take part in every computation, so what is decided
outside of computations, such as to save and stop, is decided by all together.
Process 0 alone reads and writes the workdir, which the others need not see, and
gives them what it has read.

Where there is one process, nothing of this is started and nothing is waited
for: the functions below then do what they are named after at once.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import itertools
import json
import logging
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import clusters, distributed as jax_distributed
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from resnet_flax.run import errors, signals as signals_lib

_logger = logging.getLogger(__name__)

PyTree = Any
T = TypeVar("T")

# Seconds between tries to reach an address.
_RETRY = 0.5
# Seconds in which processes that fail wait for the others to fail as well.
_LEAVE = 15
# What process 0 does for all may take as long as a download.
_PATIENCE = 24 * 3600

_HOW = (
  "pass --coordinator_address=HOST:PORT (process 0's), --num_processes=N and"
  " --process_id=I (0 to N-1) to every process"
)
_LOST = (
  "this process cannot go on: most likely another process of the run has ended"
  " or cannot be reached; see its own messages. What was saved is good: start"
  " the same command in all processes again, and it goes on from there."
)

# How errors begin that are not about other processes.
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")

# Of MPICH and its kin; of Open MPI, of which JAX knows versions below 5.
_SIZES_OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")

# Not public. The public way, to initialize with what there is, also starts a
# service where there is but one process.
_detect = clusters.ClusterEnv.auto_detect_unset_distributed_params

# Names what is exchanged: processes do the same in the same order.
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Cluster:
  """How one process finds the others.

  Attributes:
    coordinator_address: HOST:PORT of process 0.
    num_processes: all of them.
    process_id: this one's, from 0.
    local_device_ids: those of its host's devices that it takes; None: all.
  """

  coordinator_address: str
  num_processes: int
  process_id: int
  local_device_ids: tuple[int, ...] | None = None


def find_cluster(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout: int = 300,
) -> Cluster | None:
  """The processes of this run.

  What is not given is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID, else from what JAX detects: TPU pods, Slurm, Open MPI 4,
  Kubernetes and, with mpi4py, any other MPI. Where all is given a process takes
  all devices of its host, or those of JAX_LOCAL_DEVICE_IDS.

  Args:
    coordinator_address: HOST:PORT of process 0.
    num_processes: all of them; 1 asks for no detection.
    process_id: this one's.
    timeout: seconds in which a host's name must be found.

  Returns:
    None where this process is the only one.

  Raises:
    ConfigError: too little is given, or it does not fit together.
  """
  given: tuple[Any, Any, Any] = (
    coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS") or None,
    _integer("JAX_NUM_PROCESSES") if num_processes is None else num_processes,
    _integer("JAX_PROCESS_ID") if process_id is None else process_id,
  )
  if given[1] == 1 and given[2] in (None, 0):
    return None
  local_device_ids = None
  if None in given:
    given, local_device_ids = _detected(given, timeout)
  address, count, index = given
  if given == (None, None, None) or (count == 1 and index in (None, 0)):
    return None
  missing = [
    name
    for name, value in (
      ("coordinator_address", address),
      ("num_processes", count),
      ("process_id", index),
    )
    if value is None
  ]
  if missing:
    raise errors.ConfigError(f"{' and '.join(missing)} not given: {_HOW}.")
  if count < 1 or not 0 <= index < count:
    raise errors.ConfigError(
      f"process_id={index} with num_processes={count} cannot be used; needed:"
      " 0 <= process_id < num_processes, another one in every process."
    )
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise errors.ConfigError(
      f"coordinator_address={address!r} cannot be used; needed: HOST:PORT,"
      " for example 10.0.0.1:8476."
    )
  return Cluster(address, count, index, local_device_ids)


def _integer(variable: str) -> int | None:
  text = os.environ.get(variable)
  if not text:
    return None
  if not text.isdecimal():
    raise errors.ConfigError(
      f"{variable}={text!r} cannot be used; needed: an integer."
    )
  return int(text)


def _detected(
  given: tuple[Any, Any, Any], timeout: int
) -> tuple[tuple[Any, Any, Any], tuple[int, ...] | None]:
  """What is given, and for what is missing what JAX detects; local devices."""
  try:
    with warnings.catch_warnings():
      # That a package which could detect more is missing.
      warnings.simplefilter("ignore")
      *found, devices = _detect(*given, None, None, timeout)
  # Whatever is asked for, such as a cloud's metadata, fails in ways of its own.
  except Exception as error:
    _logger.warning(
      "warning: this looks like a cluster, but its processes cannot be found"
      " (%s). If there are several, %s.",
      errors.one_line(error),
      _HOW,
    )
    return given, None
  started = max(_integer(name) or 1 for name in _SIZES_OF_MPI)
  if None in found and started > 1:
    *found, devices = _found_by_mpi4py(given, started, timeout)
  address, count, index = found
  # JAX looks at the variable only where nothing else is said.
  if devices is None or os.environ.get("JAX_LOCAL_DEVICE_IDS"):
    return (address, count, index), None
  return (address, count, index), tuple(devices)


def _found_by_mpi4py(
  given: tuple[Any, Any, Any], started: int, timeout: int
) -> tuple[Any, Any, Any, Any]:
  """What JAX finds with mpi4py, which it uses only if asked to.

  Args:
    given: what is not to be found.
    started: processes, as the launcher says.
    timeout: in seconds.

  Raises:
    ConfigError: mpi4py is missing, or of another MPI.
  """
  how = f"{_HOW}; or --num_processes=1 to work alone"
  if importlib.util.find_spec("mpi4py") is None:
    raise errors.ConfigError(
      f"MPI has started {started} processes, which mpi4py finds: pip install"
      f" mpi4py; or {how}."
    )
  try:
    found = _detect(*given, None, "mpi4py", timeout)
  # It loads a library of MPI, which may not be there.
  except Exception as error:
    raise errors.ConfigError(
      f"mpi4py does not work here ({errors.one_line(error)}): mend it; or"
      f" {how}."
    ) from error
  if found[1] != started:
    raise errors.ConfigError(
      f"MPI has started {started} processes, but mpi4py finds {found[1]}: it is"
      f" of another MPI. Build it with this one; or {how}."
    )
  return found


@contextlib.contextmanager
def connected(
  cluster: Cluster | None, *, timeout: int = 300, heartbeat_timeout: int = 60
) -> Iterator[None]:
  """Inside, the processes of a run are connected; they end together.

  To be entered before JAX is asked for its devices. From then on the death of
  another process ends this one, with a line that says what to do: when it is
  noticed, which is at once for process 0's, and for others' `heartbeat_timeout`
  later at most.

  Args:
    cluster: from `find_cluster`; with None nothing is done.
    timeout: seconds in which all processes must have come.
    heartbeat_timeout: seconds after which a process that is not heard of
      counts as dead.

  Raises:
    ConfigError: the address does not answer, or cannot be listened at.
  """
  if cluster is None:
    yield
    return
  deadline = time.monotonic() + timeout
  address = cluster.coordinator_address
  wait = (
    f"within {timeout} s (--initialization_timeout). See that process 0 runs,"
    " that its host and port can be reached from here, and that all"
    f" {cluster.num_processes} processes have been started with the same"
    " --coordinator_address and --num_processes."
  )
  if cluster.process_id:
    _logger.info("waiting for coordinator_address=%s", address)
    try:
      _await_answer(address, deadline)
    except OSError as error:
      raise errors.ConfigError(
        f"coordinator_address={address} did not answer ({error}) {wait}"
      ) from None
    # What all have to say is said by process 0.
    logging.getLogger("resnet_flax").setLevel(logging.WARNING)
  else:
    _logger.info(
      "waiting for num_processes=%d at coordinator_address=%s",
      cluster.num_processes,
      address,
    )
  # It would take SIGTERM from `StopSignals`, and knows of no Ctrl-C.
  jax.config.update("jax_enable_preemption_service", False)
  # Python hears of no signal while the runtime waits.
  stops = signals_lib.StopSignals(exits=True)
  with _quiet_stderr() as stderr, stops:

    def stopped() -> str:
      os.dup2(stderr, 2)
      return "stopped while the processes of the run were being connected."

    stops.say_on_exit(stopped)
    # The runtime ends the process if the others do not come.
    _say_on_abort(
      f"not all of num_processes={cluster.num_processes} processes came to"
      f" coordinator_address={address} {wait}",
      stderr,
      errors.ConfigError.exit_code,
    )
    try:
      jax.distributed.initialize(
        address,
        cluster.num_processes,
        cluster.process_id,
        cluster.local_device_ids,
        # What there is to detect has been.
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, round(deadline - time.monotonic())),
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=_LEAVE,
      )
    # JAX's runtime has many kinds.
    except Exception as error:
      raise errors.ConfigError(
        f"coordinator_address={address} cannot be used:"
        f" {errors.one_line(error)}. Another --coordinator_address, for example"
        " with another port, may do."
      ) from None
  _say_on_abort(_LOST, os.dup(2), 1)
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if str(error).startswith(_OWN_FAULTS):
      raise
    # What is left of a computation that another process was part of.
    raise errors.UserError(f"{_LOST} ({errors.one_line(error)})") from error
  except (errors.UserError, signals_lib.Stopped):
    # What process 0 saves when all stop may take long. Else the others, who go
    # on, may never come.
    _leave(_PATIENCE if _JointAgreement.has_stopped else _LEAVE)
    raise
  _leave(_PATIENCE)


def _await_answer(address: str, deadline: float) -> None:
  host, _, port = address.rpartition(":")
  while True:
    try:
      left = max(deadline - time.monotonic(), 0.1)
      socket.create_connection((host.strip("[]"), int(port)), left).close()
      return
    except OSError:
      if time.monotonic() + _RETRY > deadline:
        raise
      time.sleep(_RETRY)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[int]:
  """Inside, what is written to standard error is lost; yields the real one."""
  saved = os.dup(2)
  with open(os.devnull, "wb") as null:
    os.dup2(null.fileno(), 2)
  try:
    yield saved
  finally:
    os.dup2(saved, 2)


_on_abort: Any = None


def _say_on_abort(text: str, stderr: int, exit_code: int) -> None:
  """Sets what is said when JAX's runtime aborts the process.

  It does so from a thread of its own when it hears of another process's death,
  and has no other way to tell: a callback ends in a failed cast of C++. A
  handler of Python's own would come too late.

  Args:
    text: the line.
    stderr: the file descriptor that it is written to.
    exit_code: the process's.
  """
  global _on_abort  # What C may call must stay.
  line = f"error: {text}\n".encode()

  def end(number: int) -> NoReturn:
    del number
    os.write(stderr, line)
    os._exit(exit_code)

  _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
  ctypes.CDLL(None).signal(int(signal.SIGABRT), _on_abort)


def _leave(seconds: int) -> None:
  """Waits for the others, if they are about to end as well, and disconnects.

  Process 0 may not end before: its end would take the others for a failure. Nor
  may the others, which while it saves would be missed.

  Args:
    seconds: how long, unless one dies meanwhile.
  """
  try:
    _client().wait_at_barrier("resnet_flax/leave", seconds * 1000)
  except Exception:
    return  # They are not: what ends this process is its own.
  jax.distributed.shutdown()


def _client() -> Any:
  # Not public, but what other libraries use as well.
  return jax_distributed.global_state.client


def is_first() -> bool:
  """Whether this is process 0, which alone reads and writes the workdir."""
  return jax.process_index() == 0


def first(function: Callable[[], T]) -> T:
  """Calls a function in process 0 alone; all get what it returns or raises.

  Args:
    function: what it returns can be written as JSON.

  Raises:
    UserError: the function did in process 0.
  """
  if jax.process_count() == 1:
    return function()
  key = f"resnet_flax/first/{next(_numbers)}"
  if not is_first():
    text = _client().blocking_key_value_get(key, _PATIENCE * 1000)
    answer = json.loads(text)
    if "error" not in answer:
      return answer["value"]
    kind = getattr(errors, answer["error"], errors.UserError)
    raise kind(answer["message"])
  try:
    value = function()
  except errors.UserError as error:
    answer = {"error": type(error).__name__, "message": str(error)}
    _client().key_value_set(key, json.dumps(answer))
    raise
  _client().key_value_set(key, json.dumps({"value": value}))
  return value


def first_then_others(function: Callable[[], T]) -> T:
  """Calls a function in all processes, but not before process 0 has done so.

  For what is prepared once on a disk that they may share.

  Raises:
    UserError: the function did, in this process or in process 0.
  """
  results: list[T] = []
  first(lambda: results.append(function()))
  return results[0] if results else function()


def check_same(name: str, value: Any) -> None:
  """Checks that all processes have the same value.

  Args:
    name: what it is.
    value: can be written as JSON.

  Raises:
    ConfigError: they have not; names one that differs. In all processes.
  """
  if jax.process_count() == 1:
    return
  prefix = f"resnet_flax/same/{next(_numbers)}"
  text = json.dumps(value, sort_keys=True)
  _client().key_value_set(f"{prefix}/{jax.process_index()}", text)

  def compare() -> None:
    for process in range(1, jax.process_count()):
      other = _client().blocking_key_value_get(
        f"{prefix}/{process}", _PATIENCE * 1000
      )
      if other != text:
        raise errors.ConfigError(
          f"{name} of process {process} differs from process 0's:"
          f" {_difference(json.loads(text), json.loads(other), process)}. Start"
          " all processes with the same command, but for --process_id."
        )

  first(compare)


def _difference(own: Any, other: Any, process: int) -> str:
  if isinstance(own, dict) and isinstance(other, dict):
    keys = sorted(own.keys() | other.keys())
    return ", ".join(
      f"{key} ({own.get(key)!r} in process 0, {other.get(key)!r} there)"
      for key in keys
      if own.get(key) != other.get(key)
    )
  return f"{own!r} in process 0, {other!r} there"


def first_only(function: Callable[[], T]) -> T | None:
  """What a function returns in process 0; None in the others.

  Raises:
    UserError: the function did in process 0.
  """
  results: list[T] = []
  first(lambda: results.append(function()))
  return results[0] if results else None


def meet() -> None:
  """Waits until all processes are here.

  To be called before they compute together after work that may take some of
  them longer: on CPUs they connect when they first do, and give up after half a
  minute.
  """
  if jax.process_count() > 1:
    key = f"resnet_flax/meet/{next(_numbers)}"
    _client().wait_at_barrier(key, _PATIENCE * 1000)


def from_first(function: Callable[[], T], like: Callable[[], PyTree]) -> T:
  """Arrays of process 0 in all processes, to the bit.

  Args:
    function: called in process 0 alone; returns a tree of arrays.
    like: called in the others; returns the tree of their shapes and dtypes.
  """
  if jax.process_count() == 1:
    return function()
  if is_first():
    leaves, structure = jax.tree.flatten(function())
    arrays = [np.asarray(leaf) for leaf in leaves]
  else:
    leaves, structure = jax.tree.flatten(like())
    arrays = [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
  # As one vector of integers: a program of its own for each array would have to
  # be compiled, and sums of floats lose the sign of a zero.
  sizes = np.cumsum([array.nbytes for array in arrays])
  whole = np.zeros(-(-sizes[-1] // 4) * 4, np.uint8)
  for array, end in zip(arrays, sizes, strict=True):
    whole[end - array.nbytes : end] = np.frombuffer(array.tobytes(), np.uint8)
  meet()
  shared = multihost_utils.broadcast_one_to_all(whole.view(np.uint32))
  shared = np.asarray(shared).view(np.uint8)
  parts = [
    shared[end - array.nbytes : end].view(array.dtype).reshape(array.shape)
    if array.nbytes
    else array
    for array, end in zip(arrays, sizes, strict=True)
  ]
  return jax.tree.unflatten(structure, parts)


class Agreement:
  """When to save and to stop, for the loop of a single process."""

  def __init__(
    self, signals: signals_lib.StopSignals, timer: signals_lib.Timer
  ):
    self._signals = signals
    self._timer = timer

  def until(self, step: int) -> bool:
    """Whether to save after so many steps."""
    return (
      self._signals.requested
      or self._timer.due_at(step)
      or self._timer.overdue()
    )

  def check(self) -> None:
    """Raises `Stopped` if a signal has come."""
    self._signals.check()

  def on_batch(self) -> None:
    """Raises `Stopped` if a signal has come; after a batch."""
    self._signals.check()


class _JointAgreement(Agreement):
  """The same for many processes, whose signals and clocks differ.

  After every step and batch, which all have together, each says which signal it
  has had and whether a checkpoint is overdue by its clock: a computation over
  all devices, which waits in their queue and is read one step late, as the
  step's metrics are. So all know the same after the same step.
  """

  # Whether the processes have agreed to stop.
  has_stopped = False

  def __init__(
    self,
    signals: signals_lib.StopSignals,
    timer: signals_lib.Timer,
    devices: Sequence[jax.Device],
  ):
    super().__init__(signals, timer)
    mesh = Mesh(np.asarray(devices), "device", axis_types=(AxisType.Auto,))
    self._sharding = NamedSharding(mesh, PartitionSpec("device"))
    self._num_devices = len(devices)
    self._votes: dict[tuple[int, int], jax.Array] = {}
    self._count = jax.jit(
      lambda votes: votes.max(axis=0),
      out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    self._pending: jax.Array | None = None

  def until(self, step: int) -> bool:
    signal_number, overdue = self._vote()
    return bool(signal_number or overdue) or self._timer.due_at(step)

  def check(self) -> None:
    self._pending = None
    self._vote()
    self._stop_if(*self._read())

  def on_batch(self) -> None:
    self._stop_if(*self._vote())

  def _stop_if(self, signal_number: int, overdue: int) -> None:
    del overdue
    if signal_number:
      _JointAgreement.has_stopped = True
      raise signals_lib.Stopped(signal_number)

  def _vote(self) -> tuple[int, int]:
    """Says what this process wants; returns what was wanted the last time."""
    wanted = (self._signals.number or 0, int(self._timer.overdue()))
    if wanted not in self._votes:
      # Kept: nearly always the same.
      self._votes[wanted] = jax.make_array_from_callback(
        (self._num_devices, 2),
        self._sharding,
        lambda index: np.asarray([wanted], np.int32),
      )
    counted = self._count(self._votes[wanted])
    before = self._read()
    self._pending = counted
    return before

  def _read(self) -> tuple[int, int]:
    if self._pending is None:
      return 0, 0
    signal_number, overdue = np.asarray(self._pending).tolist()
    self._pending = None
    return signal_number, overdue


def agreement(
  signals: signals_lib.StopSignals,
  timer: signals_lib.Timer,
  devices: Sequence[jax.Device],
) -> Agreement:
  """What decides, for all processes at the same step, when to save and stop.

  Args:
    signals: of this process.
    timer: of this process.
    devices: of the run.
  """
  if jax.process_count() == 1:
    return Agreement(signals, timer)
  return _JointAgreement(signals, timer, devices)
