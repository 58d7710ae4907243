"""The Keras CIFAR-10 example: ResNet-20 v1, batch 32, 200 epochs, Adam.

The other files of this folder are deltas over this one. Every key, with its
default and meaning, is in `resnet_flax/run/config.py`; `--help` and
`docs/configuration.md` list them. After `--config` a key may be set on the
command line, for example `--config.model.depth=56`.
"""

from ml_collections import ConfigDict

from resnet_flax.run import config as config_keys


def get_config() -> ConfigDict:
  """Returns every key with its default, locked."""
  return config_keys.default_config()
