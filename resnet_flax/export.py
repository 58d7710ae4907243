"""The command `python -m resnet_flax.export`: see `tools/export/command.py`."""

from resnet_flax.run import process
from resnet_flax.tools.export import command

if __name__ == "__main__":
  process.run(command.main)
