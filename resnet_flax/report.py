"""The command `python -m resnet_flax.report`: see `tools/report/command.py`."""

from resnet_flax.run import process
from resnet_flax.tools.report import command

if __name__ == "__main__":
  process.run(command.main)
