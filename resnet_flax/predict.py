"""The command `python -m resnet_flax.predict`: see `tools/predict.py`."""

from resnet_flax.run import process
from resnet_flax.tools import predict

if __name__ == "__main__":
  process.run(predict.main)
