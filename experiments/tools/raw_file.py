"""The flag --out, for commands whose flags are absl's."""

import pathlib
from typing import Any

from absl import flags

from experiments.tools import flag_types
from resnet_flax.run import files

_OUT = flags.DEFINE_string("out", "", "JSON file for the raw figures.")
flags.register_validator(
  "out",
  lambda path: not path or flag_types.can_be_written(path),
  f"{flag_types.CAN_BE_WRITTEN}.",
)


def write(results: dict[str, Any]) -> None:
  """Writes an experiment's raw figures to --out, if it is passed."""
  if _OUT.value:
    files.write_json(pathlib.Path(_OUT.value), results)
