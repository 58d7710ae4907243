"""Every configuration can be used, and every key of it is read."""

import ast
import importlib
import pathlib

import pytest
from ml_collections import ConfigDict

import resnet_flax
from configs import base
from resnet_flax.run import (
  config as config_keys,
  experiment as experiment_lib,
  rules,
)

FOLDER = pathlib.Path(base.__file__).parent
NAMES = sorted(
  path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__"
)
PACKAGE = pathlib.Path(resnet_flax.__file__).parent
# These go over all keys, or check them: that is no use of any.
NO_USE = {"config.py", "keys.py", "help_text.py", "rules.py", "command_line.py"}


@pytest.mark.parametrize("name", NAMES)
def test_config_can_be_used(name):
  module = importlib.import_module(f"configs.{name}")
  config = module.get_config()
  rules.check(config, num_devices=1)
  assert config.is_locked
  experiment_lib.build(config)
  if name != "base":
    # The docstring says where it comes from and how it is run.
    for word in ("Source:", "Expected:", "Cost:", "Command:"):
      assert word in module.__doc__
    command = f"python -m resnet_flax.main --config=configs/{name}.py"
    assert command in module.__doc__


def attributes_read():
  """(base, attribute) of each `base.attribute` that the package reads.

  Of a base only the last name: 'model' of `config.model.depth`.
  """
  read = set()
  for path in PACKAGE.rglob("*.py"):
    if path.parent.name == "run" and path.name in NO_USE:
      continue
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        of = node.value
        name = of.attr if isinstance(of, ast.Attribute) else ""
        read.add((of.id if isinstance(of, ast.Name) else name, node.attr))
  return read


def unread(keys, read):
  """Keys that no `config.NAME` or `PART.NAME` of the package reads."""
  return [
    key
    for key in keys
    if not {("config", key.split(".")[-1]), tuple(key.split("."))} & read
  ]


def test_every_key_is_read():
  read = attributes_read()
  assert unread(config_keys.KEYS, read) == []
  # It finds what is not read, also where another name or part is.
  for key in ("never_read", "model.never_read", "log.enabled", "shift_flip"):
    assert unread([key], read) == [key]


def test_nothing_else_is_read():
  """Configurations are locked: reading another key raises, too, but later."""
  known = {name for key in config_keys.KEYS for name in key.split(".")}
  read = {name for of, name in attributes_read() if of == "config"}
  assert len(read & known) > 50
  assert read - known - set(dir(ConfigDict)) == set()
