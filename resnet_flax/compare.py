"""The command `python -m resnet_flax.compare`: see `tools/compare.py`."""

from resnet_flax.run import process
from resnet_flax.tools import compare

if __name__ == "__main__":
  process.run(compare.main)
