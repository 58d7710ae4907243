"""What all tests share: strict JAX, virtual devices, tiny configurations."""

import contextlib
import ctypes
import functools
import gc
import os
import pathlib
import signal
import subprocess
from importlib import metadata

# Before JAX and Keras are imported.
os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tiny programs that run once: most of the tests' time is their compilation.
# XLA's older way to compile fusions takes half as long; later versions end the
# process at its flag.
os.environ["XLA_FLAGS"] = " ".join(
  [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false"
    if metadata.version("jaxlib") == "0.10.2"
    else "",
    os.environ.get("XLA_FLAGS", ""),
  ]
)
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "compiled"),
)
# All of them, in child processes as well: of a run's eighty programs nearly all
# are small, and the same in every file.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import numpy as np
import pytest

from configs import base
from resnet_flax.data import digits
from resnet_flax.models.kernels import onednn

# A test is one process, whatever has started pytest.
for name in (
  *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
  *("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS", "PMI_SIZE"),
):
  os.environ.pop(name, None)

NUM_DEVICES = 8
# From here on a worker gives back what it has compiled, after a file and after
# a test. Below, it keeps what the next one compiles too.
MUCH_MEMORY, TOO_MUCH_MEMORY = 900_000_000, 1_400_000_000

# The compilation cache cannot keep programs with oneDNN's convolution: the
# tests of kernels/convolution.py turn it on.
onednn.enabled = False
# Hundreds of runs read the digits, which are resized at each reading.
digits.read = functools.cache(digits.read)
jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
jax.config.update("jax_numpy_rank_promotion", "raise")


def resident_bytes():
  """The memory of this process; a large number where it is not known."""
  try:
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
  except OSError:
    return MUCH_MEMORY
  return int(pages) * os.sysconf("SC_PAGE_SIZE")


def free_programs(limit):
  """Frees compiled programs if this process has more bytes than `limit`."""
  if resident_bytes() < limit:
    return
  jax.clear_caches()
  gc.collect()
  with contextlib.suppress(OSError, AttributeError):
    # What is free goes back to the system, where the C library can do that.
    ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True, scope="module")
def small_worker_after_a_file():
  yield
  free_programs(MUCH_MEMORY)


@pytest.fixture(autouse=True)
def small_worker_after_a_test():
  yield
  free_programs(TOO_MUCH_MEMORY)


@pytest.fixture
def ctrl_c():
  """Ctrl-C works, here and in child processes, even in a background job.

  So does the end of a terminal, even after `nohup`.
  """
  interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
  hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGINT, interrupt)
  signal.signal(signal.SIGHUP, hangup)


@pytest.fixture
def one_device():
  """The first device alone: most tests need no more."""
  return jax.devices()[:1]


@pytest.fixture(scope="session")
def make_tiny_config():
  """A function of the cache folder that makes what `tiny_config` is."""

  def make(cache_dir):
    config = base.get_config()
    config.batch_size = 8
    config.num_epochs = 2
    config.eval_batch_size = 100
    config.dataset.name = "digits"
    config.dataset.cache_dir = str(cache_dir)
    config.dataset.train_examples = 32
    config.model.depth = 8
    config.model.num_filters = 4
    config.log.tensorboard = False
    return config

  return make


@pytest.fixture
def tiny_config(make_tiny_config, tmp_path):
  """An experiment that trains in seconds: 2 epochs of 4 steps on digits."""
  return make_tiny_config(tmp_path / "cache")


@pytest.fixture
def random_images():
  """A function of (count, shape) that makes fixed uint8 noise."""

  def make(count, shape=(32, 32, 3)):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, *shape), np.uint8)

  return make


class SmallDisk:
  """A file system of 4 MB that can be filled up."""

  def __init__(self, folder):
    self.folder = folder

  def fill(self):
    """Fills the disk to the last byte."""
    file = (self.folder / "filler").open("wb", buffering=0)
    with file, contextlib.suppress(OSError):
      while True:
        file.write(bytes(4096))

  def free(self):
    """Makes room again."""
    (self.folder / "filler").unlink()


@pytest.fixture
def small_disk(tmp_path):
  """A `SmallDisk`."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
  try:
    subprocess.run(mount, check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError):
    pytest.skip("needs the right to mount a tmpfs")
  yield SmallDisk(folder)
  subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def cifar_data_dir():
  """The user's TFDS directory, if it holds a prepared CIFAR-10."""
  folder = os.environ.get("TFDS_DATA_DIR", "")
  if not folder or not (pathlib.Path(folder) / "cifar10").is_dir():
    pytest.skip("needs TFDS_DATA_DIR with a prepared cifar10")
  return folder
