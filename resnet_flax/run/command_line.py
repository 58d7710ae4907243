"""Parses the command line so that every mistake ends in one line."""

import hashlib
import os
import re
import warnings

import jax
from absl import flags, logging as absl_logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from resnet_flax.data import cache
from resnet_flax.run import (
  config as config_rules,
  environment,
  errors,
  folder as workdir,
  progress,
)

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, for example configs/v1_depth20.py. Must come before its"
  " overrides, for example --config.model.depth=56.",
)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; for `app.run(flags_parser=...)`.

  Args:
    argv: the program's name and its arguments.

  Returns:
    The arguments that are no flags.

  Raises:
    ConfigError: an unknown flag or key, a value of the wrong type, a config
      file that is missing or fails.
  """
  path = _config_path(argv)
  if path is not None:
    _check_keys(argv, _load(path))
  try:
    rest = flags.FLAGS(argv)
  # The parsers of values raise what Python's own parser does.
  except Exception as error:
    hint = ""
    if "before a value for --config" in str(error):
      hint = ". Put --config=FILE before its overrides."
    raise errors.ConfigError(_one_line(error) + hint) from error
  if len(rest) > 1:
    raise errors.ConfigError(
      f"unexpected argument {rest[1]!r}: every argument is --flag=value. Try"
      " --helpshort."
    )
  return rest


def has_config() -> bool:
  """Whether a --config was given."""
  return _CONFIG.value is not None


def config_and_workdir() -> tuple[ConfigDict, str]:
  """The configuration of the command line and its default workdir.

  Raises:
    ConfigError: no --config was given.
  """
  if not has_config():
    raise errors.ConfigError(
      "no --config: pass a config file, for example"
      " --config=configs/v1_depth20.py (--mode=eval needs only --workdir)."
    )
  flag = flags.FLAGS["config"]
  path = config_flags.get_config_filename(flag)
  config_rules.check_values(_CONFIG.value)
  original = config_rules.to_flat(_load(path))
  current = config_rules.to_flat(_CONFIG.value)
  overrides = {
    key: value
    for key, value in current.items()
    if value != original.get(key) and key not in config_rules.FREE_KEYS
  }
  # A path may have bytes that are no text.
  name = path.encode(errors="backslashreplace").decode()
  return _CONFIG.value, f"runs/{workdir.default_name(name, overrides)}"


def set_up() -> None:
  """Sets up messages and the compilation cache, before JAX is first used."""
  progress.log_to_stderr()
  # The libraries' own messages are about their internals; what matters of
  # them comes as an exception.
  absl_logging.set_verbosity(absl_logging.FATAL)
  # What uses oneDNN's convolution cannot be kept; see models/onednn.py.
  warnings.filterwarnings(
    "ignore", "Error writing persistent compilation cache entry.*MemoryError"
  )
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    # Programs for a CPU depend on its model, and home directories are shared.
    cpu = hashlib.sha256(environment.cpu_model().encode()).hexdigest()[:8]
    folder = cache.cache_dir("") / f"compiled-{cpu}"
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _config_path(argv: list[str]) -> str | None:
  for position, argument in enumerate(argv):
    if argument in ("--config", "-config"):
      return argv[position + 1] if position + 1 < len(argv) else None
    if match := re.match(r"--?config=(.*)", argument, re.DOTALL):
      return match[1]
  return None


def _load(path: str) -> ConfigDict:
  file = path.partition(":")[0]
  if not os.path.isfile(file):
    raise errors.ConfigError(
      f"--config={path}: there is no such file; see the repository's"
      " folder configs/."
    )
  try:
    config = ConfigFileFlagParser("config").parse(path)
  except KeyboardInterrupt:
    raise
  # Whatever a config file raises, also to leave the program, is the user's to
  # see, in one line.
  except BaseException as error:
    hint = ""
    if isinstance(error, ModuleNotFoundError):
      hint = ". Run from the repository's top folder."
    raise errors.ConfigError(
      f"--config={path} fails: {type(error).__name__}: {_one_line(error)}{hint}"
    ) from error
  if not isinstance(config, ConfigDict):
    raise errors.ConfigError(
      f"--config={path}: get_config() returns {type(config).__name__}; needed:"
      " an ml_collections.ConfigDict."
    )
  return config


def _check_keys(argv: list[str], config: ConfigDict) -> None:
  known = config_rules.to_flat(config)
  for argument in argv[1:]:
    if argument == "--":
      return
    match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    if match and match[1] not in known:
      raise errors.unknown_name("config key", match[1], known)


def _one_line(error: BaseException) -> str:
  """The last line of a message: the others are a library's traceback."""
  lines = [line for line in str(error).splitlines() if line.strip()]
  line = lines[-1].strip() if lines else type(error).__name__
  # What is wrong comes at the end, after the value, however long.
  return line if len(line) <= 300 else f"{line[:150]}...{line[-150:]}"
