"""Reads a sweep file and checks the runs that it defines.

A sweep file is Python and sets these names. Only CONFIG and GRID are required:

  CONFIG = "configs/v1_depth20.py"  # The configuration of all cells.
  OVERRIDES = {"num_epochs": 3}  # The changes of all cells.
  GRID = {"model.depth": [20, 56], "seed": [0, 1]}  # Every combination.
  CPUS_PER_CELL = 2  # The resources of one cell; see `Resources`.
  GPUS_PER_CELL = 0

GRID can be a list of such dictionaries; their combinations are concatenated. A
sweep file may set other names if they are not in capitals.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import runpy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from resnet_flax.run import errors, folder as workdir_lib, keys, rules

_NAMES = ("CONFIG", "OVERRIDES", "GRID", "CPUS_PER_CELL", "GPUS_PER_CELL")


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of a sweep."""

  workdir: pathlib.Path  # Its name lists the cell's overrides.
  arguments: tuple[str, ...]  # For `resnet_flax.main`, without the workdir.
  config: ConfigDict  # The result of these arguments.

  @property
  def name(self) -> str:
    """The name of its workdir."""
    return self.workdir.name

  @property
  def log(self) -> pathlib.Path:
    """The log of its process, beside its workdir."""
    return self.workdir.with_name(f"{self.name}.log")


class Resources(NamedTuple):
  """The resources of a cell; as many cells run at once as have resources."""

  # Cores; Linux restricts the process to them. None means a GPU's share of the
  # cores if a machine has GPUs, else all cores: one cell at a time is fastest.
  cpus: int | None = None
  gpus: int | None = None  # None means one if a machine has GPUs.


class Sweep(NamedTuple):
  """The content of a sweep file."""

  cells: tuple[Cell, ...]  # At least one, in the order of the grid.
  resources: Resources  # The resources of each cell.


def load(path: str, workdir: pathlib.Path, resources: Resources) -> Sweep:
  """Reads a sweep file and checks the configuration of every cell.

  `workdir` is the parent of the cells' folders; nothing is written yet.
  Resources other than None override the file's. Raises `ConfigError` if the
  file is missing, raises or has another form, or if a cell has an invalid key
  or value or occurs twice.
  """
  values = _run(path)
  config = values["CONFIG"]
  if not isinstance(config, str) or not os.path.isfile(
    config.partition(":")[0]
  ):
    raise errors.ConfigError(
      f"--sweep={path}: CONFIG={config!r} must be a config file, for example"
      " 'configs/v1_depth20.py', relative to the current folder."
    )
  common = values.get("OVERRIDES", {})
  if not isinstance(common, Mapping):
    raise _wrong_form(path, "OVERRIDES", common, "a dictionary")
  cpus = _count(path, "CPUS_PER_CELL", 1, values)
  gpus = _count(path, "GPUS_PER_CELL", 0, values)
  resources = Resources(
    cpus if resources.cpus is None else resources.cpus,
    gpus if resources.gpus is None else resources.gpus,
  )
  known = keys.to_flat(_parse(config, ()))
  cells: dict[str, Cell] = {}
  for point in _points(path, values["GRID"]):
    for key in point.keys() & common.keys():
      raise errors.ConfigError(
        f"--sweep={path}: {key} is both in OVERRIDES and in GRID. Remove"
        " one of them."
      )
    name = workdir_lib.default_name(config, point)
    for key in [*common, *point]:
      if key not in known:
        error = keys.unknown_key(str(key), known)
        raise errors.ConfigError(f"cell {name}: {error}")
    cell = _cell(
      workdir / name, config, {**common, **point}, resources.gpus or 1
    )
    identity = json.dumps(cell.config.to_dict(), sort_keys=True)
    if identity in cells:
      raise errors.ConfigError(
        f"--sweep={path}: cell {name} is the same run as cell"
        f" {cells[identity].name}. Remove one of them."
      )
    cells[identity] = cell
  return Sweep(tuple(cells.values()), resources)


def _run(path: str) -> dict[str, Any]:
  """Runs a sweep file and returns its names in capitals."""
  if not os.path.isfile(path):
    raise errors.ConfigError(
      f"--sweep={path}: there is no such file. Pass a sweep file, for example"
      " experiments/depth_ablation/degradation.py."
    )
  try:
    values = runpy.run_path(path)
  except KeyboardInterrupt:
    raise
  # The user must see every error of the file, SystemExit included.
  except BaseException as error:
    raise errors.ConfigError(
      f"--sweep={path} fails: {errors.one_line(error)}"
    ) from error
  values = {name: value for name, value in values.items() if name.isupper()}
  for name in sorted(values.keys() - set(_NAMES)):
    raise errors.unknown_name(f"--sweep={path}: name", name, _NAMES)
  for name in ("CONFIG", "GRID"):
    if name not in values:
      raise errors.ConfigError(f"--sweep={path} must set {name}.")
  return values


def _wrong_form(
  path: str, name: str, value: Any, needed: str
) -> errors.ConfigError:
  return errors.ConfigError(
    f"--sweep={path}: {name}={str(value)[:100]} must be {needed}."
  )


def _count(
  path: str, name: str, least: int, values: Mapping[str, Any]
) -> int | None:
  value = values.get(name)
  if value is not None and (type(value) is not int or value < least):
    raise _wrong_form(path, name, value, f"an integer from {least}")
  return value


def _points(path: str, grid: Any) -> list[dict[str, Any]]:
  """Lists all combinations of all grids."""
  points = []
  for part in grid if isinstance(grid, list) else [grid]:
    if not isinstance(part, Mapping) or not all(
      isinstance(values, list) and values for values in part.values()
    ):
      raise _wrong_form(
        path,
        "GRID",
        part,
        "a dictionary, or a list of them, of lists of at least one value",
      )
    combinations = itertools.product(*part.values())
    points += [dict(zip(part, values, strict=True)) for values in combinations]
  if not points:
    raise _wrong_form(path, "GRID", grid, "at least one cell")
  return points


def _cell(
  workdir: pathlib.Path,
  config_path: str,
  overrides: Mapping[str, Any],
  num_devices: int,
) -> Cell:
  overrides_given = [
    f"--config.{key}={_text(value)}" for key, value in overrides.items()
  ]
  try:
    config = _parse(config_path, overrides_given)
    rules.check(config, num_devices)
    rules.check_num_classes(config)
  except errors.ConfigError as error:
    raise errors.ConfigError(f"cell {workdir.name}: {error}") from error
  arguments = (f"--config={config_path}", *overrides_given)
  return Cell(workdir, arguments, config)


def _text(value: Any) -> str:
  """Formats a value for the command line."""
  if isinstance(value, bool):
    return str(value).lower()
  return str(tuple(value) if isinstance(value, list) else value)


def _parse(config_path: str, overrides: Sequence[str]) -> ConfigDict:
  """Parses a config file and overrides as the command line does.

  The same parser ensures that the checked configuration is the cell's.
  """
  arguments = ["sweep", f"--config={config_path}", *overrides]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", flag_values=values, sys_argv=arguments
  )
  try:
    values(arguments)
  except KeyboardInterrupt:
    raise
  except BaseException as error:
    raise errors.ConfigError(
      f"CONFIG={config_path}: {errors.one_line(error)}"
    ) from error
  if not isinstance(values.config, ConfigDict):
    raise errors.ConfigError(
      f"CONFIG={config_path}: get_config() returns"
      f" {type(values.config).__name__}; it must return a ConfigDict."
    )
  return values.config
