"""What a sweep is: the runs that a sweep file names, each checked.

A sweep file is Python and sets these names, of which only CONFIG and GRID are
needed:

  CONFIG = "configs/v1_depth20.py"  # What all cells start from.
  OVERRIDES = {"num_epochs": 3}  # What all of them change.
  GRID = {"model.depth": [20, 56], "seed": [0, 1]}  # Every combination.
  CPUS_PER_CELL = 2  # What one cell is given; see `Resources`.
  GPUS_PER_CELL = 0

GRID can be a list of such dictionaries, whose combinations are put one after
the other. Other names may be set if they are not in capitals.
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

from resnet_flax.run import (
  errors,
  folder as workdir_lib,
  keys,
  rules,
)

_NAMES = ("CONFIG", "OVERRIDES", "GRID", "CPUS_PER_CELL", "GPUS_PER_CELL")


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of a sweep.

  Attributes:
    workdir: its folder; the name says what is special about it.
    arguments: of `resnet_flax.main`, without the workdir.
    config: what these arguments make.
  """

  workdir: pathlib.Path
  arguments: tuple[str, ...]
  config: ConfigDict

  @property
  def name(self) -> str:
    """What it is called."""
    return self.workdir.name

  @property
  def log(self) -> pathlib.Path:
    """What its process writes, beside its workdir."""
    return self.workdir.with_name(f"{self.name}.log")


class Resources(NamedTuple):
  """What a cell is given; as many run at once as there are resources for.

  Attributes:
    cpus: cores. Where it is less than all of the machine's, the process is
      kept to as many cores (on Linux). None: with GPUs a GPU's share of a
      machine's cores, else all of them: one cell at a time is fastest.
    gpus: None: one where there are any.
  """

  cpus: int | None = None
  gpus: int | None = None


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What a sweep file says.

  Attributes:
    cells: at least one, in the order of the grid.
    resources: of each of them.
  """

  cells: tuple[Cell, ...]
  resources: Resources


def load(path: str, workdir: pathlib.Path, resources: Resources) -> Sweep:
  """Reads a sweep file and checks the configuration of every cell.

  Args:
    path: the sweep file.
    workdir: gets a folder for each cell; nothing is written yet.
    resources: what is not None in it takes the place of what the file says.

  Raises:
    ConfigError: the file is missing, fails or is of another form; a cell has a
      key or a value that cannot be used, or is there twice.
  """
  values = _run(path)
  config = values["CONFIG"]
  if not isinstance(config, str) or not os.path.isfile(
    config.partition(":")[0]
  ):
    raise errors.ConfigError(
      f"--sweep={path}: CONFIG={config!r} must be a config file, for example"
      " 'configs/v1_depth20.py', seen from the folder where this is run."
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
        f"--sweep={path}: {key} is both in OVERRIDES and in GRID. Leave"
        " one out."
      )
    name = workdir_lib.default_name(config, point)
    for key in [*common, *point]:
      if key not in known:
        raise keys.unknown_key(str(key), known, f"cell {name}: config key")
    cell = _cell(
      workdir / name, config, {**common, **point}, resources.gpus or 1
    )
    identity = json.dumps(cell.config.to_dict(), sort_keys=True)
    if identity in cells:
      raise errors.ConfigError(
        f"--sweep={path}: cell {name} is the same run as cell"
        f" {cells[identity].name}. Leave one out."
      )
    cells[identity] = cell
  return Sweep(tuple(cells.values()), resources)


def _run(path: str) -> dict[str, Any]:
  """The names in capitals that a sweep file sets."""
  if not os.path.isfile(path):
    raise errors.ConfigError(
      f"--sweep={path}: there is no such file; for example"
      " experiments/depth_ablation/sweep.py."
    )
  try:
    values = runpy.run_path(path)
  except KeyboardInterrupt:
    raise
  # Whatever it raises, also to leave the program, is the user's to see.
  except BaseException as error:
    raise errors.ConfigError(
      f"--sweep={path} fails: {errors.one_line(error)}"
    ) from error
  values = {name: value for name, value in values.items() if name.isupper()}
  for name in sorted(values.keys() - set(_NAMES)):
    raise errors.unknown_name(f"--sweep={path}: name", name, _NAMES)
  for name in ("CONFIG", "GRID"):
    if name not in values:
      raise errors.ConfigError(f"--sweep={path} does not set {name}.")
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
  """All combinations of all grids."""
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
    rules.check_labels(config)
  except errors.ConfigError as error:
    raise errors.ConfigError(f"cell {workdir.name}: {error}") from error
  arguments = (f"--config={config_path}", *overrides_given)
  return Cell(workdir, arguments, config)


def _text(value: Any) -> str:
  """A value as the command line takes it."""
  if isinstance(value, bool):
    return str(value).lower()
  return str(tuple(value) if isinstance(value, list) else value)


def _parse(config_path: str, overrides: Sequence[str]) -> ConfigDict:
  """What the command line makes of a config file and overrides.

  By the same parser, so that what is checked here is what the cell gets.
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
