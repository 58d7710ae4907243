"""Parses the command line so that every mistake ends in one line."""

import itertools
import os
import pathlib
import re
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from resnet_flax.run import config as config_keys, errors, help_text, keys

# Arguments with flag files expanded; ml_collections looks here for overrides.
_ARGV: list[str] = []
_SHIPPED = pathlib.Path(__file__).parents[1] / "configs"
CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, such as configs/v1_depth20.py, or a built-in config, such as"
  " v1_depth20. Must come before overrides such as --config.model.depth=56.",
  sys_argv=_ARGV,
)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line or raises `ConfigError`; for `app.run`."""
  try:
    argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
  except (flags.Error, UnicodeError) as error:
    raise errors.ConfigError(
      f"--flagfile: {_last_line(error)}. It must be a text file with one flag"
      " on each line."
    ) from error
  _ARGV[:] = argv
  flags.FLAGS["config"].parser = _ConfigFile("config")
  help_text.show_if_asked(argv)
  try:
    rest = flags.FLAGS(argv)
  # Python's own parser reads values and raises many kinds of exceptions.
  except Exception as error:
    if isinstance(error.__context__, errors.ConfigError):
      raise error.__context__ from None
    hint = ""
    if "before a value for --config" in str(error):
      hint = ". Put --config=FILE before its overrides."
    elif isinstance(error, flags.UnrecognizedFlagError):
      if (name := error.flagname).startswith("config."):
        line = f"--{name} needs --config=FILE before it, also with --mode=eval."
        raise errors.ConfigError(line) from None
      for key in keys.nearest_keys(error.flagname, config_keys.KEYS)[:1]:
        hint = f". A key is set by --config.{key}=VALUE, after --config."
    raise errors.ConfigError(_last_line(error) + hint) from error
  if rest[1:]:
    raise errors.ConfigError(
      f"unexpected argument {rest[1]!r}: every argument must be --flag=value."
      " Try --help."
    )
  return rest


class _ConfigFile(ConfigFileFlagParser):
  """Executes the config file once per start; checks the names of overrides."""

  before: dict[str, Any]  # The flat config before overrides: {'seed': 0, ...}.

  def parse(self, path: str) -> ConfigDict:
    path = str(errors.local_path(path, "--config"))
    file, *argument = path.split(":", 1)
    if not os.path.isfile(file):
      shipped = [each.stem for each in _SHIPPED.glob("[!_]*.py")]
      if file not in shipped:
        fault = f"--config={path[:100]}: there is no such file"
        if (name := pathlib.PurePath(file).stem) in shipped:
          raise errors.ConfigError(f"{fault}. The program has --config={name}.")
        raise errors.unknown_name(f"{fault}, and the name", name, shipped)
      path = ":".join([f"{_SHIPPED / file}.py", *argument])
    try:
      config = super().parse(path)
    except KeyboardInterrupt:
      raise
    # Any exception of a config file, even SystemExit, must end in one line.
    except BaseException as error:
      reason = f"{type(error).__name__}: {_last_line(error)}"
      if isinstance(error, ModuleNotFoundError):
        reason += ". The program's own configs are in resnet_flax.configs."
      raise errors.ConfigError(f"--config={path} fails: {reason}") from error
    if not isinstance(config, ConfigDict):
      raise errors.ConfigError(
        f"--config={path}: get_config() returns {type(config).__name__}; it"
        " must return an ml_collections.ConfigDict."
      )
    self.before = keys.to_flat(config)
    options = itertools.takewhile(lambda argument: argument != "--", _ARGV[1:])
    for option in options:
      match = re.match(r"--?(?:no)?config\.([^=]*)", option)
      if match and match[1] not in self.before:
        raise keys.unknown_key(match[1], config_keys.KEYS)
    return config


def _last_line(error: BaseException) -> str:
  """The last line of an error's message; the others may be a traceback."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  line = lines[-1].strip()
  # A message may begin with a value of any length; its end has the reason.
  return line if len(line) <= 300 else f"{line[:150]}...{line[-150:]}"


def config_and_workdir() -> tuple[ConfigDict, str]:
  """The configuration, not yet checked, and its default workdir."""
  if CONFIG.value is None:
    raise errors.ConfigError(
      "no --config: pass a config file, for example"
      " --config=configs/v1_depth20.py (--mode=eval needs only --workdir)."
    )
  from resnet_flax.run import folder

  flag = flags.FLAGS["config"]
  assert isinstance(flag.parser, _ConfigFile)  # Set by `parse_flags`.
  overrides = {
    key: value
    for key, value in keys.to_flat(CONFIG.value).items()
    if value != flag.parser.before.get(key)
    and key not in config_keys.MAY_DIFFER
  }
  path = config_flags.get_config_filename(flag)
  return CONFIG.value, f"runs/{folder.default_name(path, overrides)}"
