"""Several processes on this machine, as if each were a host."""

import http.server
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from unittest import mock

import jax
import pytest

from resnet_flax.parallel import hosts
from resnet_flax.run import errors, metrics
from tests.helpers import Programs, saved_steps, untimed

ROOT = pathlib.Path(__file__).parents[2]
NEVER = 10**9
SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "localhost",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
}
OPEN_MPI = {
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1,10.148.0.1:34911",
  "OMPI_COMM_WORLD_SIZE": "2",
  "OMPI_COMM_WORLD_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


def free_address():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"


def explicit(count):
  """The environments of so many processes, without a launcher."""
  address = free_address()
  return [
    {
      "JAX_COORDINATOR_ADDRESS": address,
      "JAX_NUM_PROCESSES": f"{count}",
      "JAX_PROCESS_ID": f"{index}",
    }
    for index in range(count)
  ]


def start(commands, environments):
  """Starts a worker for each command and environment."""
  return [
    subprocess.Popen(
      [sys.executable, "-m", "tests.distributed_worker", *map(str, command)],
      cwd=ROOT,
      env={
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        **environ,
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for command, environ in zip(commands, environments, strict=True)
  ]


def ends(processes, within=300):
  """Exit codes, outputs and errors; all end soon after the last of them."""
  *others, last = processes
  try:
    last_output = last.communicate(timeout=300)
    outputs = [other.communicate(timeout=within) for other in others]
    outputs.append(last_output)
  finally:
    for process in processes:
      process.kill()
  codes = [process.returncode for process in processes]
  return codes, [out for out, _ in outputs], [err for _, err in outputs]


def run(scenario, environments, seconds=0):
  """What a worker of each environment says, with codes and errors."""
  commands = [(scenario, seconds)] * len(environments)
  with tempfile.TemporaryDirectory() as folder:
    # Not standard output, to which Gloo's threads write, too.
    files = [pathlib.Path(folder, f"{k}") for k in range(len(environments))]
    for file, environ in zip(files, environments, strict=True):
      file.touch()
      environ["SAID"] = str(file)
    codes, _, texts = ends(start(commands, environments))
    said = [[*map(json.loads, file.read_text().splitlines())] for file in files]
  return codes, said, texts


def train_two(config, workdirs, count, name, *flags):
  """Codes and errors of two processes, one of which gets a signal."""
  stored = workdirs[0].parent / "config.json"
  stored.write_text(json.dumps(config.to_dict()))
  config_file = workdirs[0].parent / "config.py"
  config_file.write_text(
    "import json, ml_collections\n"
    "def get_config():\n"
    f"  with open({str(stored)!r}) as file:\n"
    "    return ml_collections.ConfigDict(json.load(file))\n"
  )
  address = free_address()
  commands = [
    (
      *("train", *event, f"--config={config_file}", f"--workdir={workdir}"),
      *(f"--coordinator_address={address}", "--num_processes=2"),
      *(f"--process_id={index}", *flags),
    )
    for index, (workdir, event) in enumerate(
      zip(workdirs, [(NEVER, "SIGTERM"), (count, name)], strict=True)
    )
  ]
  codes, _, texts = ends(start(commands, [{}, {}]), within=60)
  return codes, texts


@pytest.mark.slow
@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_two_processes_are_one_run(tiny_config, tmp_path, steps_per_call):
  """Stopped, killed, and resumed by one process of as many devices."""
  tiny_config.eval_batch_size = 150
  # A bias before a batch norm has no gradient but rounding errors, of which
  # Adam makes steps of full size.
  tiny_config.model.conv_bias = False
  workdirs = tmp_path / "run", tmp_path / "unused"

  def train_until(count, name, *flags):
    """Process 1 gets a signal."""
    return train_two(tiny_config, workdirs, count, name, *flags)

  # In the first epoch; the other process hears of it a step later.
  codes, texts = train_until(2, "SIGTERM")
  assert codes == [143, 143], texts
  assert saved_steps(workdirs[0]) == [3]
  for text in texts:
    last = text.splitlines()[-1]
    assert last.startswith("error: stopped by SIGTERM; saved up to step 3 in ")

  # In the second.
  codes, texts = train_until(
    *(3, "SIGKILL", "--heartbeat_timeout=5"),
    f"--config.steps_per_call={steps_per_call}",
  )
  assert codes == [1, -signal.SIGKILL], texts
  assert "resuming after step 3 of" in texts[0]
  assert "epoch 0 of 2" in texts[0]
  assert "epoch 0 of 2" not in texts[1]
  last = texts[0].splitlines()[-1]
  assert last.startswith("error: this process cannot continue: most likely")
  assert "Traceback" not in texts[0]
  assert not workdirs[1].exists()
  by_two = metrics.MetricsLog(workdirs[0]).read()
  assert len(by_two) == 1

  four, programs = jax.devices()[:4], Programs()
  resumed = programs.train(tiny_config, workdirs[0], devices=four)
  assert resumed[:1] == by_two
  alone = programs.train(tiny_config, tmp_path / "alone", devices=four)
  for one, other in zip(untimed(alone), untimed(resumed), strict=True):
    assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_two_processes_resume_from_a_mirror(tiny_config, tmp_path):
  """Process 0 alone fills its workdir, and copies what is in it."""
  twins = tmp_path / "twin", tmp_path / "unused"
  codes, texts = train_two(tiny_config, twins, NEVER, "SIGTERM")
  assert codes == [0, 0], texts

  tiny_config.checkpoint.mirror = str(tmp_path / "disk")
  workdirs = tmp_path / "run", tmp_path / "unused"
  codes, texts = train_two(tiny_config, workdirs, 5, "SIGTERM")
  assert codes == [143, 143], texts
  (step,) = saved_steps(workdirs[0])[1:]
  shutil.rmtree(workdirs[0])
  codes, texts = train_two(tiny_config, workdirs, NEVER, "SIGTERM")
  assert codes == [0, 0], texts
  assert f"filled {workdirs[0]} from {tmp_path / 'disk'}" in texts[0]
  assert f"resuming after step {step} of" in texts[0]
  assert "filled" not in texts[1]
  assert not workdirs[1].exists()
  one, other = (
    metrics.MetricsLog(folder).read() for folder in (twins[0], workdirs[0])
  )
  assert untimed(one) == untimed(other)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["explicit", "slurm", "open mpi"])
def test_what_processes_tell_one_another(launcher):
  """Found by themselves; with Slurm, process 0 takes 35 s for each task."""
  environments = {
    "explicit": explicit(2),
    "slurm": [SLURM | {"SLURM_PROCID": f"{index}"} for index in range(2)],
    "open mpi": [
      OPEN_MPI | {"OMPI_COMM_WORLD_RANK": f"{index}"} for index in range(2)
    ],
  }[launcher]
  seconds = 35 if launcher == "slurm" else 0
  codes, said, texts = run("exchange", environments, seconds)
  assert codes == [0, 0], texts
  differs = "differs from process 0's:"
  same = "Start all processes with the same command, except for --process_id."
  for index, lines in enumerate(said):
    assert lines == [
      [{"a": [1, 2.5, None]}],
      [[True] * 4],
      [[True] * 4],
      [index, None if index else "own"],
      [
        f"the configuration of process 1 {differs} a (0 in process 0, 1 there)."
        f" {same}"
      ],
      [
        f"it of process 1 {differs} value ('0' in process 0, '1' there). {same}"
      ],
      ["NonFiniteError", "not finite", 1],
      ["ConfigError", "wrong", 2],
      ["DataError", "missing", 1],
    ]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_process_0_has_saved():
  """Also if the save takes longer than a failing process waits for others."""
  codes, said, texts = run("stop", explicit(2), seconds=20)
  assert codes == [143, 143], texts
  # Read one step late.
  assert said == [[["saves after", 6], ["stops"]]] * 2


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_all():
  codes, _, texts = run("quit", explicit(2))
  assert codes == [1, 2], texts
  assert texts[1].splitlines()[-1] == "error: wrong here"
  assert "most likely another process of the run has ended" in texts[0]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("scenario", "text"),
  [
    ("lose", "error: this process cannot continue: most likely another"),
    ("exhaust", "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: out of"),
  ],
)
def test_not_all_that_fails_is_another_processs_fault(scenario, text):
  codes, _, texts = run(scenario, explicit(2))
  assert codes == [1, 1], texts
  assert text in texts[0].splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_others_that_do_not_come_end_in_one_line(index, tmp_path):
  """Also where process 0 does not answer."""
  address = free_address()
  command = (
    *("train", 1, "SIGTERM", f"--workdir={tmp_path}", "--num_processes=2"),
    f"--config={ROOT / 'configs' / 'quickstart.py'}",
    *(f"--coordinator_address={address}", f"--process_id={index}"),
    "--initialization_timeout=2",
  )
  (code,), _, (text,) = ends(start([command], [{}]))
  assert code == 2
  _, last = text.splitlines()
  assert last.startswith(
    "error: not all of num_processes=2 processes connected to"
    f" coordinator_address={address} within 2 s"
  )


# ---- How they are found


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ((None, 2, None), "coordinator_address and process_id not given"),
    ((None, 2, 0), "coordinator_address not given"),
    (("host:1", None, None), "num_processes and process_id not given"),
    (("host:1", 2, 2), "process_id=2 with num_processes=2 must be from 0"),
    (("host:1", 2, -1), "process_id=-1"),
    (("host:1", 0, 0), "num_processes=0"),
    (("host", 2, 0), "coordinator_address='host' must be HOST:PORT"),
    (("host:70000", 2, 0), "must be HOST:PORT"),
  ],
)
def test_what_does_not_fit_together(given, message):
  with pytest.raises(errors.ConfigError, match=message):
    hosts.find_cluster(*given)


@pytest.fixture
def environment(monkeypatch):
  """A function that sets environment variables."""

  def set_all(**variables):
    for name, value in variables.items():
      monkeypatch.setenv(name, value)

  return set_all


def test_one_process_and_processes_that_are_given(environment):
  assert hosts.find_cluster() is None
  assert hosts.find_cluster(None, 1, None) is None
  given = hosts.Cluster(2, 1, "host:1", "deactivate")
  assert hosts.find_cluster("host:1", 2, 1) == given
  environment(
    JAX_COORDINATOR_ADDRESS="host:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1"
  )
  assert hosts.find_cluster() == given
  environment(JAX_PROCESS_ID="two")
  with pytest.raises(errors.ConfigError, match="JAX_PROCESS_ID='two'"):
    hosts.find_cluster()


@pytest.mark.parametrize("launcher", [SLURM, OPEN_MPI])
def test_a_launchers_processes_are_found(environment, launcher):
  environment(**launcher)
  # JAX finds address and index.
  assert hosts.find_cluster() == hosts.Cluster(2)
  # What is given counts; a process takes all devices only if all is.
  assert hosts.find_cluster("host:1") == hosts.Cluster(2, None, "host:1")
  given = hosts.Cluster(3, 2, "host:1", "deactivate")
  assert hosts.find_cluster("host:1", 3, 2) == given
  assert hosts.find_cluster(num_processes=1) is None


@pytest.mark.parametrize(
  "alone",
  [
    SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    # In a batch script.
    {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"},
    {"OMPI_COMM_WORLD_SIZE": "1"},
    {"PMI_SIZE": "1"},
    {"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "localhost"},
    {"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"},
    {"TPU_WORKER_HOSTNAMES": "one,two"},  # Without TPUs.
  ],
)
def test_a_launcher_of_one_process_starts_nothing(environment, alone):
  environment(**alone)
  assert hosts.find_cluster() is None


@pytest.mark.parametrize(
  ("slices", "count"), [({}, 2), ({"MEGASCALE_NUM_SLICES": "4"}, 8)]
)
def test_tpu_workers_are_found(environment, slices, count):
  workers = {"TPU_WORKER_HOSTNAMES": "one,two", "TPU_WORKER_ID": "1"}
  environment(TPU_ML_PLATFORM="JAX", **workers, **slices)
  # JAX finds address and index.
  assert hosts.find_cluster() == hosts.Cluster(count)


@pytest.mark.parametrize(
  ("attributes", "cluster"),
  [
    (
      {"worker-network-endpoints": "a:b:10.0.0.1,a:b:10.0.0.2"},
      hosts.Cluster(2),
    ),
    ({"worker-network-endpoints": "a:b:10.0.0.1"}, None),
    (
      {
        "worker-network-endpoints": "a:b:10.0.0.1",
        "tpu-env": "A: 'b'\nMEGASCALE_NUM_SLICES: '2'\n",
      },
      hosts.Cluster(2),
    ),
    ({}, None),
    (None, None),
  ],
)
def test_tpu_vms_ask_the_cloud(
  environment, monkeypatch, caplog, attributes, cluster
):
  """A server on this machine gives a VM's metadata; with None none answers."""
  environment(TPU_ML_PLATFORM="JAX", GCE_METADATA_IP=free_address())
  monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
  if attributes is None:
    assert hosts.find_cluster() is None
    assert "does not tell the hosts of this TPU VM" in caplog.text
    return

  class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      assert self.headers["Metadata-Flavor"] == "Google"
      text = attributes.get(self.path.rpartition("/")[2])
      self.send_response(200 if text else 404)
      self.end_headers()
      self.wfile.write((text or "").encode())

    def log_message(self, *_):
      pass

  with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
    environment(GCE_METADATA_IP=f"127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert hosts.find_cluster() == cluster
    server.shutdown()


def test_other_mpis_are_found_with_mpi4py(environment, monkeypatch):
  environment(PMI_SIZE="4")
  assert hosts.find_cluster("host:1", 2, 1) is not None
  assert hosts.find_cluster(num_processes=1) is None
  monkeypatch.setitem(sys.modules, "mpi4py", None)
  with pytest.raises(errors.ConfigError, match="pip install mpi4py, built"):
    hosts.find_cluster()
  # It cannot be installed without an MPI.
  world = mock.Mock(**{"Get_size.return_value": 4})
  mpi4py = types.ModuleType("mpi4py")
  mpi4py.MPI = mock.Mock(COMM_WORLD=world)
  monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)
  assert hosts.find_cluster() == hosts.Cluster(4, None, None, "mpi4py")
  world.Get_size.return_value = 1
  with pytest.raises(errors.ConfigError, match="mpi4py finds 1 processes"):
    hosts.find_cluster()
