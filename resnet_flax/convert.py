"""The command `python -m resnet_flax.convert`: see `tools/convert.py`."""

from resnet_flax.tools import convert

if __name__ == "__main__":
  convert.run()
