"""What a run ran on, recorded so that its numbers can be judged later."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

_LIBRARIES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "ml-collections",
  "tensorflow-datasets",
  "numpy",
)


def describe(devices: list[jax.Device]) -> dict[str, Any]:
  """The environment as a JSON object.

  Args:
    devices: those that the run uses.

  Returns:
    `git_commit` and `git_clean` (None outside a git checkout), `python`,
    `libraries`, `platform`, `cpu_model`, `cpu_threads`, `devices`,
    `processes`.
  """
  commit, clean = _git_state()
  return {
    "git_commit": commit,
    "git_clean": clean,
    "python": platform.python_version(),
    "libraries": {
      name: importlib.metadata.version(name) for name in _LIBRARIES
    },
    "platform": platform.platform(),
    "cpu_model": cpu_model(),
    "cpu_threads": num_cpu_threads(),
    "devices": [device.device_kind for device in devices],
    "processes": jax.process_count(),
  }


def num_cpu_threads() -> int:
  """How many CPU threads this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """What differs between two environments, one line each, for people."""
  return [
    f"{key}: {old.get(key)} -> {new.get(key)}"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  ]


def cpu_model() -> str:
  """The CPU's name as the operating system tells it."""
  try:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()


def _git_state() -> tuple[str | None, bool | None]:
  folder = pathlib.Path(__file__).parent

  def git(*arguments: str) -> str:
    return subprocess.run(
      ["git", "-C", str(folder), *arguments],
      capture_output=True,
      text=True,
      check=True,
      timeout=10,
    ).stdout.strip()

  try:
    # An installed package may lie inside some other project's checkout.
    git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
    return git("rev-parse", "HEAD"), not git("status", "--porcelain")
  except (OSError, subprocess.SubprocessError):
    return None, None
