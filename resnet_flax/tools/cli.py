"""The command `resnet-flax NAME`, which runs `python -m resnet_flax.NAME`."""

import os
import runpy
import sys

from resnet_flax.run import errors

_MODES = ("train", "eval", "summary")  # Modes of `resnet_flax.main`.
_MODULES = ("predict", "convert", "export", "report", "compare")
COMMANDS = (*_MODES, *_MODULES, "sweep")


def run() -> None:
  """Runs the command that the first argument names, or ends with an error."""
  name = "".join(sys.argv[1:2])
  if name in ("-h", "--help"):
    print(f"resnet-flax {'|'.join(COMMANDS)} ... (each has its own --help)")
    return
  if name not in COMMANDS:
    errors.exit_with(str(errors.unknown_name("command", name, COMMANDS)), 2)
  module = f"resnet_flax.{'main' if name in _MODES else name}"
  if name == "sweep":
    if not os.path.exists("experiments/sweep.py"):
      errors.exit_with("sweep must be run in the folder of the repository", 2)
    module = "experiments.sweep"
    sys.path.insert(0, "")
  sys.argv[1:2] = [f"--mode={name}"] if name in _MODES else []
  runpy.run_module(module, run_name="__main__", alter_sys=True)
