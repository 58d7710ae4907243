"""The command line's configuration, as arguments of another command."""

from absl import flags
from ml_collections import config_flags


def config_arguments() -> list[str]:
  """--config=FILE and each override as --config.KEY=VALUE, however passed."""
  flag = flags.FLAGS["config"]
  overrides = config_flags.get_override_values(flag).items()
  path = config_flags.get_config_filename(flag)
  return [f"--config={path}", *(f"--config.{k}={v}" for k, v in overrides)]
