"""Several processes on this machine, as if each were a host."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import types
from importlib import machinery
from unittest import mock

import jax
import pytest

from resnet_flax import train
from resnet_flax.parallel import hosts as distributed
from resnet_flax.run import checkpoint, errors, metrics

ROOT = pathlib.Path(__file__).parents[2]
SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[001-002]",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
}


def free_address():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"


def start(workdirs, config_file, events, *flags):
  """Starts a process for each workdir, which sends itself a signal."""
  address = free_address()
  return [
    subprocess.Popen(
      [
        sys.executable,
        *("-m", "tests.distributed_worker", *map(str, event)),
        f"--config={config_file}",
        f"--workdir={workdir}",
        f"--coordinator_address={address}",
        f"--num_processes={len(workdirs)}",
        f"--process_id={process_id}",
        *flags,
      ],
      cwd=ROOT,
      env={
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for process_id, (workdir, event) in enumerate(
      zip(workdirs, events, strict=True)
    )
  ]


def ends(processes, within=300):
  """Exit codes and standard errors; all end soon after the last of them."""
  *others, last = processes
  try:
    last_output = last.communicate(timeout=300)
    outputs = [other.communicate(timeout=within) for other in others]
    outputs.append(last_output)
  finally:
    for process in processes:
      process.kill()
  codes = [process.returncode for process in processes]
  return codes, [stderr for _, stderr in outputs]


def test_two_processes_are_one_run(tiny_config, tmp_path):
  """Stopped, killed, and gone on with by one process of as many devices."""
  tiny_config.num_epochs = 3
  tiny_config.eval_batch_size = 150
  # A bias before a batch norm has no gradient but rounding errors, of which
  # Adam makes steps of full size.
  tiny_config.model.conv_bias = False
  stored = tmp_path / "config.json"
  stored.write_text(json.dumps(tiny_config.to_dict()))
  config_file = tmp_path / "config.py"
  config_file.write_text(
    "import json, ml_collections\n"
    "def get_config():\n"
    f"  with open({str(stored)!r}) as file:\n"
    "    return ml_collections.ConfigDict(json.load(file))\n"
  )
  workdirs = tmp_path / "run", tmp_path / "unused"
  never = 10**9, "SIGTERM"

  # In the second epoch, to one process; the others hear of it a step later.
  codes, texts = ends(start(workdirs, config_file, (never, (5, "SIGTERM"))))
  assert codes == [143, 143], texts
  with checkpoint.Checkpoints(workdirs[0], read_only=True) as checkpoints:
    assert checkpoints.steps() == [4, 7]
  for text in texts:
    last = text.splitlines()[-1]
    assert last.startswith("error: stopped by SIGTERM; saved up to step 7 in ")
  assert "epoch 1/3" in texts[0]
  assert "epoch 1/3" not in texts[1]

  # In the third.
  codes, texts = ends(
    start(
      workdirs,
      config_file,
      (never, (2, "SIGKILL")),
      "--heartbeat_timeout=10",
      "--config.steps_per_call=2",
    ),
    within=60,
  )
  assert codes == [1, -signal.SIGKILL], texts
  assert "going on after step 7 of" in texts[0]
  assert (
    texts[0]
    .splitlines()[-1]
    .startswith(
      "error: this process cannot go on: most likely another process of the run"
    )
  )
  assert "Traceback" not in texts[0]
  assert not workdirs[1].exists()
  by_two = metrics.MetricsLog(workdirs[0]).read()
  assert len(by_two) == 2

  four = jax.devices()[:4]
  went_on = train.train_and_evaluate(tiny_config, workdirs[0], devices=four)
  assert went_on[:2] == by_two
  alone = train.train_and_evaluate(
    tiny_config, tmp_path / "alone", devices=four
  )
  for one, other in zip(
    metrics.untimed(alone), metrics.untimed(went_on), strict=True
  ):
    assert other == pytest.approx(one, rel=1e-5)


def test_others_that_do_not_come_end_in_one_line(tmp_path):
  (process,) = start(
    [tmp_path],
    ROOT / "configs" / "quickstart.py",
    [(1, "SIGTERM")],
    "--num_processes=2",
    "--initialization_timeout=2",
  )
  (code,), (text,) = ends([process])
  assert code == 2
  first, last = text.splitlines()
  address = first.rpartition("=")[2]
  assert last.startswith(
    "error: not all of num_processes=2 processes came to"
    f" coordinator_address={address} within 2 s"
  )


def test_an_address_that_does_not_answer():
  address = free_address()
  cluster = distributed.Cluster(address, 2, 1)
  with (
    pytest.raises(errors.ConfigError, match=f"{address} did not answer"),
    distributed.connected(cluster, timeout=1),
  ):
    pass


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ((None, 2, None), "coordinator_address and process_id not given"),
    ((None, 2, 0), "coordinator_address not given"),
    (("host:1", None, None), "num_processes and process_id not given"),
    (("host:1", 2, 2), "process_id=2 with num_processes=2 cannot be used"),
    (("host:1", 2, -1), "process_id=-1"),
    (("host:1", 0, 0), "num_processes=0"),
    (("host", 2, 0), "coordinator_address='host' cannot be used"),
    (("host:70000", 2, 0), "needed: HOST:PORT"),
  ],
)
def test_what_does_not_fit_together(given, message):
  with pytest.raises(errors.ConfigError, match=message):
    distributed.find_cluster(*given)


def test_where_the_processes_are_found(monkeypatch):
  assert distributed.find_cluster() is None
  given = distributed.Cluster("host:1", 2, 1)
  assert distributed.find_cluster("host:1", 2, 1) == given
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  found = distributed.find_cluster()
  assert found is not None
  assert found.coordinator_address.startswith("node001:")
  assert (found.num_processes, found.process_id) == (2, 1)
  # A task has the GPU of its own.
  assert found.local_device_ids == (0,)
  assert distributed.find_cluster(num_processes=1) is None
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
  monkeypatch.setenv("JAX_PROCESS_ID", "2")
  assert distributed.find_cluster() == distributed.Cluster("host:1", 3, 2)
  monkeypatch.setenv("JAX_PROCESS_ID", "two")
  with pytest.raises(errors.ConfigError, match="JAX_PROCESS_ID='two'"):
    distributed.find_cluster()


def test_open_mpi_is_found(monkeypatch):
  for name, value in {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "16",
    "OMPI_COMM_WORLD_RANK": "9",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
  }.items():
    monkeypatch.setenv(name, value)
  found = distributed.find_cluster()
  assert found is not None
  assert found.coordinator_address.startswith("10.96.0.1:")
  assert (found.num_processes, found.process_id) == (16, 9)
  assert found.local_device_ids == (1,)


def test_other_mpis_are_found_with_mpi4py(monkeypatch):
  monkeypatch.setenv("PMI_SIZE", "1")
  assert distributed.find_cluster() is None
  monkeypatch.setenv("PMI_SIZE", "4")
  assert distributed.find_cluster("host:1", 2, 1) is not None
  assert distributed.find_cluster(num_processes=1) is None
  monkeypatch.setitem(sys.modules, "mpi4py", None)
  with pytest.raises(errors.ConfigError, match="pip install mpi4py; or pass"):
    distributed.find_cluster()
  # It cannot be installed without an MPI.
  world = mock.Mock(
    **{
      "Get_rank.return_value": 2,
      "Get_size.return_value": 4,
      "bcast.return_value": "host:61441",
      "Split_type.return_value.Get_rank.return_value": 0,
    }
  )
  mpi4py = types.ModuleType("mpi4py")
  mpi4py.__spec__ = machinery.ModuleSpec("mpi4py", None)
  mpi4py.MPI = mock.Mock(COMM_WORLD=world)
  monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)
  found = distributed.Cluster("host:61441", 4, 2, (0,))
  assert distributed.find_cluster() == found
  monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1")
  assert distributed.find_cluster() == dataclasses.replace(
    found, local_device_ids=None
  )
  world.Get_size.return_value = 1
  with pytest.raises(errors.ConfigError, match="4 processes, but mpi4py finds"):
    distributed.find_cluster()


@pytest.fixture
def connected(monkeypatch):
  """Inside `distributed.connected`, of one that does not connect."""
  monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
  monkeypatch.setattr(distributed, "_say_on_abort", lambda *_: None)
  return distributed.connected(distributed.Cluster("127.0.0.1:1", 2, 0))


@pytest.mark.parametrize(
  ("text", "kind"),
  [
    ("UNAVAILABLE: connection reset", errors.UserError),
    ("RESOURCE_EXHAUSTED: out of memory", jax.errors.JaxRuntimeError),
  ],
)
def test_not_all_that_fails_is_another_processs_fault(connected, text, kind):
  with pytest.raises(kind), connected:
    raise jax.errors.JaxRuntimeError(text)


@pytest.mark.parametrize(
  ("error", "agreed", "patient"),
  [
    (None, False, True),
    (errors.Interrupted("saved", signal.SIGTERM), True, True),
    # Of this process alone, before the first step.
    (errors.Interrupted("nothing saved", signal.SIGTERM), False, False),
    (errors.ConfigError("wrong here"), False, False),
  ],
)
def test_processes_that_are_done_wait_for_what_process_0_saves(
  connected, error, agreed, patient, monkeypatch
):
  waits = []
  monkeypatch.setattr(distributed, "_leave", waits.append)
  monkeypatch.setattr(distributed._JointAgreement, "has_stopped", agreed)
  with contextlib.suppress(errors.UserError), connected:
    if error:
      raise error
  assert waits == [distributed._PATIENCE if patient else distributed._LEAVE]


def test_a_job_of_one_task_is_alone(monkeypatch):
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv("SLURM_NTASKS", "1")
  monkeypatch.setenv("SLURM_PROCID", "0")
  assert distributed.find_cluster() is None
