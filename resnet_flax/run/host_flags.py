"""The flags of a run on several hosts; see `parallel/hosts.py`."""

import contextlib

from absl import flags

from resnet_flax.run import errors

_COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address",
  None,
  "Several hosts: HOST:PORT of process 0, or $JAX_COORDINATOR_ADDRESS. Not"
  " needed where JAX finds the processes by itself: on TPU pods, with Slurm,"
  " Open MPI 4 and, where mpi4py is installed, any other MPI.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes",
  None,
  "Several hosts: number of processes, or $JAX_NUM_PROCESSES. 1: this process"
  " works alone, wherever it runs.",
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Several hosts: own number, from 0, or $JAX_PROCESS_ID."
)
_INITIALIZATION_TIMEOUT = flags.DEFINE_integer(
  "initialization_timeout",
  300,
  "Several hosts: seconds within which all processes must have started.",
  lower_bound=1,
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
  "heartbeat_timeout",
  60,
  "Several hosts: seconds after which a silent process counts as dead, which"
  " ends the others.",
  lower_bound=5,
)


def connection(mode: str) -> contextlib.AbstractContextManager[None]:
  """`hosts.connected` with the flags; only training may have a cluster."""
  from resnet_flax.parallel import hosts

  cluster = hosts.find_cluster(
    _COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  )
  if cluster and mode != "train":
    raise errors.ConfigError(
      f"--mode={mode} runs in one process, but num_processes is"
      f" {cluster.num_processes}. Start it once; --num_processes=1 makes a"
      " process of a cluster work alone."
    )
  return hosts.connected(
    cluster,
    timeout=_INITIALIZATION_TIMEOUT.value,
    heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
  )
