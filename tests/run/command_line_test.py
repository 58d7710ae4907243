"""Config files and overrides as hostile as they come, within this process."""

import os
import pathlib
import sys

import pytest
from absl import flags
from hypothesis import given, settings, strategies as st

from resnet_flax.run import command_line, config as config_rules, errors

# How ml_collections loads config files.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "v1_depth20.py")


def parse(*arguments, config=CONFIG):
  """What the program makes of a command line; leaves no flags behind."""
  known = set(flags.FLAGS)
  argv = ["main", f"--config={config}", *arguments]
  with pytest.MonkeyPatch.context() as patch:
    # ml_collections looks for overrides there.
    patch.setattr(sys, "argv", argv)
    try:
      command_line.parse_flags(argv)
      parsed, workdir = command_line.config_and_workdir()
      config_rules.check(parsed, num_devices=1)
      return parsed, workdir
    finally:
      flags.FLAGS.unparse_flags()
      # The next config file would be loaded into what this one left.
      sys.modules.pop("config_config", None)
      for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)


def refusal(*arguments, config=CONFIG):
  """The one line that a command line is refused with."""
  with pytest.raises(errors.ConfigError) as caught:
    parse(*arguments, config=config)
  message = str(caught.value)
  assert message.isprintable()
  # The list of all keys is the longest.
  assert len(message) < 2000
  return message


def test_overrides():
  config, workdir = parse("--config.model.depth=32", "--config.seed=3")
  assert (config.model.depth, config.seed) == (32, 3)
  assert workdir == "runs/v1_depth20,model.depth=32,seed=3"
  # What changes no result is none of the name.
  _, workdir = parse("--config.seed=3", "--config.eval_batch_size=50")
  assert workdir == "runs/v1_depth20,seed=3"
  # The next one starts afresh.
  assert parse()[0].model.depth == 20


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("num_epochs=1e5", "num_epochs"),
    ("num_epochs=1000000000000", "from 1 to 2147483647"),
    ("seed=-1", "seed=-1"),
    ("seed=" + "9" * 5000, "integer string conversion"),
    ("seed=0x" + "f" * 5000, r"seed=(int) cannot be used"),
    ("batch_size=", "batch_size"),
    ("batch_size", "Missing value"),
    ("optimizer.learning_rate=nan", "learning_rate=nan"),
    ("optimizer.learning_rate=-inf", "learning_rate=-inf"),
    ("optimizer.learning_rate=1e999", "learning_rate=inf"),
    ("schedule.drop_percents=(((((", "drop_percents="),
    ("schedule.drop_percents=" + "(" * 5000, "drop_percents="),
    ("schedule.drop_percents=" + "1," * 5000, "at most 100"),
    ("schedule.drop_percents=1,2", "as many values"),
    ("schedule.drop_percents=__import__('os')", "drop_percents="),
    ("schedule.drop_factors=None", "drop_factors=None"),
    ("schedule.drop_factors=(1,(2,))", "drop_factors="),
    ("augment.flip=", "augment.flip"),
    ("model.name=", "model.name=''"),
    ("model.name=\x1b[2J\n", "is not known"),
    ("model.name=" + "x" * 100_000, "is not known"),
    ("model.depth[0]=1", "Did you mean 'model.depth'"),
    ("model=1", "is not known"),
    ("=1", "is not known"),
    ("x" * 100_000 + "=1", "is not known"),
    ("dataset.data_dir=\0", "needed: a path"),
  ],
)
def test_overrides_that_cannot_be_used(override, message):
  assert message in refusal(f"--config.{override}")


TEXTS = st.one_of(
  st.text(max_size=12),
  st.from_regex(r"[-+]?[0-9_]{0,20}(\.[0-9]*)?(e[-+]?[0-9]{1,4})?"),
  st.text("()[]{},'\"0123456789.- \\\n\0", max_size=20),
  st.sampled_from(["nan", "inf", "-inf", "None", "True", "0x" + "f" * 5000]),
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
  st.lists(
    st.tuples(st.sampled_from(sorted(config_rules.RULES)), TEXTS), max_size=3
  )
)
def test_any_overrides_are_used_or_refused_in_one_line(overrides):
  arguments = [f"--config.{key}={text}" for key, text in overrides]
  try:
    parse(*arguments)
  except errors.ConfigError:
    refusal(*arguments)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.text("-=config.seed0 \n\x1b", max_size=20), max_size=3))
def test_any_arguments_are_used_or_refused_in_one_line(arguments):
  try:
    parse(*arguments)
  except errors.ConfigError:
    refusal(*arguments)


class Unusual(BaseException):
  """Not an `Exception`, as `SystemExit` is none."""


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ("raise SystemExit", "fails: SystemExit"),
    ("raise SystemExit('bye')", "bye"),
    ("import os, sys; sys.exit(0)", "SystemExit"),
    (
      "from tests.run.command_line_test import Unusual; raise Unusual",
      "Unusual",
    ),
    ("return get_config()", "RecursionError"),
    ("raise MemoryError", "MemoryError"),
    ("raise ValueError('x' * 10**6)", "ValueError"),
    ("raise ValueError('a\\nb\\x1b[2J')", "ValueError"),
    ("return None", "returns NoneType"),
    ("return 3", "returns int"),
    ("pass", "returns NoneType"),
    ("return {}", "returns dict"),
    ("from ml_collections import ConfigDict; return ConfigDict()", "lacks"),
    ("from ml_collections import ConfigDict; return ConfigDict({1: 2})", "str"),
    (
      "from ml_collections import ConfigDict, config_dict;"
      " return ConfigDict({'seed': config_dict.required_placeholder(int)})",
      "fails: RequiredValueError",
    ),
    (
      "from configs import base; c = base.get_config().unlock();"
      " c.extra = 1; return c",
      "config key='extra' is not known",
    ),
    (
      "from configs import base; c = base.get_config().unlock();"
      " c.model = 3; return c",
      "fails: TypeError",
    ),
    (
      "from configs import base; c = base.get_config().unlock();"
      " c.seed = 10**5000; return c",
      "seed=(int) cannot be used",
    ),
    (
      "from configs import base; c = base.get_config();"
      " c.optimizer.learning_rate = float('nan'); return c",
      "learning_rate=nan",
    ),
  ],
)
def test_config_files_that_fail(tmp_path, body, message):
  path = tmp_path / "config with spaces é.py"
  path.write_text(f"def get_config():\n  {body}\n")
  assert message in refusal(config=path)


@pytest.mark.parametrize(
  "content", [b"", b"\0" * 100, b"\xff\xfe", b"(" * 10_000, b"1/0", b"\x7fELF"]
)
def test_config_files_that_are_none(tmp_path, content):
  path = tmp_path / "config.py"
  path.write_bytes(content)
  assert str(path) in refusal(config=path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_paths_that_are_no_config_file(tmp_path, make):
  path = tmp_path / "config.py"
  make(path)
  assert "there is no such file" in refusal(config=path)


@pytest.mark.parametrize("path", ["", "/dev/zero", "x\0y", "\ud800", "x" * 300])
def test_paths_that_lead_nowhere(path):
  assert "there is no such file" in refusal(config=path)


def test_an_interruption_is_none_of_the_config_file(tmp_path):
  path = tmp_path / "config.py"
  path.write_text("raise KeyboardInterrupt")
  with pytest.raises(KeyboardInterrupt):
    parse(config=path)


@pytest.mark.parametrize(
  "name", ["a b é", "日本", "a\nb", "a=b", os.fsdecode(b"\xff")]
)
def test_paths_with_spaces_and_unicode(tmp_path, name):
  path = tmp_path / f"{name}.py"
  path.write_text("from configs.v1_depth20 import get_config\n")
  data = tmp_path / name
  config, workdir = parse(f"--config.dataset.data_dir={data}", config=path)
  assert config.dataset.data_dir == str(data)
  assert workdir.isprintable()
