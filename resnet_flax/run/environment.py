"""The environment of a run, recorded to judge its numbers later."""

import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax

from resnet_flax.run import errors

_LIBRARIES = (
  *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml-collections"),
  *("tensorflow-datasets", "numpy"),
  # These decode images and read records.
  *("pillow", "grain", "array-record", "scikit-learn"),
)
# JAX's settings that change numbers. `_VARIABLES` set its libraries.
_SETTINGS = (
  *("jax_enable_x64", "jax_default_matmul_precision"),
  *("jax_default_prng_impl", "jax_threefry_partitionable"),
  "jax_random_seed_offset",
)
# Training needs these: other values change what it computes, or fail.
_NEEDED = {
  "jax_enable_x64": False,
  "jax_disable_jit": False,
  "jax_numpy_dtype_promotion": "standard",
}
_VARIABLES = (
  *("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE"),
  *("OMP_NUM_THREADS", "ONEDNN_", "DNNL_"),  # Beginnings of names.
)
# A CPU's instructions: libraries choose their kernels by these.
_VECTOR = re.compile("avx|amx|fma|f16c|sse4|asimd|sve|bf16|i8mm")
# The files that a run executes.
_CODE = (":/resnet_flax", ":/configs", ":/pyproject.toml")


def describe(devices: Sequence[jax.Device]) -> dict[str, Any]:
  """The environment of a run on these devices, as a JSON object.

  `git_commit` and `git_clean` are None outside a git checkout; a library that
  is not installed has the version None. Variables that are unset are absent.
  """
  commit, clean = _git_state()
  return {
    "git_commit": commit,
    "git_clean": clean,
    "python": platform.python_version(),
    "libraries": {name: _version(name) for name in _LIBRARIES},
    **{name: getattr(jax.config, name) for name in _SETTINGS},
    **{k: v for k, v in os.environ.items() if k.startswith(_VARIABLES)},
    "platform": platform.platform(),
    **cpu(),
    "cpu_threads": num_cpu_threads(),
    "devices": [device.device_kind for device in devices],
    "processes": jax.process_count(),
  }


def check_jax() -> None:
  """Checks that JAX compiles and uses the dtypes that training needs."""
  for name, needed in _NEEDED.items():
    value = jax.config.values[name]
    if value != needed:
      raise errors.ConfigError(
        f"{name}={value} must be {needed} for training. Unset {name.upper()}."
      )


def _version(name: str) -> str | None:
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return None  # An extra that is not installed.


def num_cpu_threads() -> int:
  """How many CPU threads this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def cpu() -> dict[str, str]:
  """The processor's name, generation and vector instructions.

  Libraries choose their kernels by the last two, and processors of one name
  may differ in them. Both are '' where the system is not Linux.
  """
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:
    text = ""
  # The last processor's lines count: all processors of a machine are alike.
  info: dict[str, str] = dict(
    re.findall(r"^(.+?)[ \t]*: *(.*?) *$", text, re.MULTILINE)
  )
  numbers = ("cpu family", "model", "stepping")
  flags = info.get("flags", info.get("Features", "")).split()
  return {
    "cpu_model": info.get("model name")
    or platform.processor()
    or platform.machine(),
    "cpu_generation": ", ".join(f"{n} {info[n]}" for n in numbers if n in info),
    "cpu_flags": " ".join(sorted(filter(_VECTOR.match, flags))),
  }


def _git_state() -> tuple[str | None, bool | None]:
  def git(*arguments: str) -> str:
    command = ["git", "-C", os.path.dirname(__file__), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, timeout=10)
    return done.stdout.decode().strip()

  try:
    # This fails where the package is installed in another project's checkout.
    git("ls-files", "--error-unmatch", os.path.basename(__file__))
    changed = git("status", "--porcelain", "--", *_CODE)
    return git("rev-parse", "HEAD"), not changed
  except (OSError, subprocess.SubprocessError):
    return None, None
