"""The command `python -m resnet_flax.convert`: see `tools/convert.py`."""

from resnet_flax.run import process

if __name__ == "__main__":
  process.catch_signals()  # Importing JAX takes seconds.
  from resnet_flax.tools import convert

  convert.run()
