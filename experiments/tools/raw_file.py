"""The flag --out, for commands whose flags are absl's."""

import os
import pathlib
from typing import Any

from absl import flags

from resnet_flax.run import files

_OUT = flags.DEFINE_string("out", "", "JSON file for the raw figures.")
# Checked first: the figures of a long measurement must not be lost.
flags.register_validator(
  "out",
  lambda path: not path or os.access(os.path.dirname(path) or ".", os.W_OK),
  "must be in a folder that exists and can be written.",
)


def write(results: dict[str, Any]) -> None:
  """Writes an experiment's raw figures to --out, if it is passed."""
  if _OUT.value:
    files.write_json(pathlib.Path(_OUT.value), results)
