"""Config files and overrides as hostile as they come, within this process."""

import importlib
import os
import pathlib
import re
import sys

import pytest
from hypothesis import given, settings, strategies as st

from resnet_flax import main  # noqa: F401, for its flags.
from resnet_flax.models import registry
from resnet_flax.run import (
  command_line,
  config as config_keys,
  errors,
  help_text,
  rules,
)
from resnet_flax.tools import summary
from tests.helpers import parse_command_line

# How ml_collections loads config files.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "v1_depth20.py")


def parse(*arguments, config=CONFIG):
  """What the program makes of a command line; leaves no flags behind."""
  given = [] if config is None else [f"--config={config}"]
  return parse_command_line("resnet_flax.main", *given, *arguments)


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
    ("num_epochs=0", "num_epochs=0 must be"),
    ("model.dept=20", "Did you mean 'model.depth'"),
    ("model.depth=21", "nearest: 20 and 26"),
    ("model.depth=deep", "deep"),
    ("model.depth=20.5", "20.5"),
    ("augment.flip=perhaps", "perhaps"),
    ("num_epochs=1000000000000", "from 1 to 2147483647"),
    ("seed=-1", "seed=-1"),
    ("seed=" + "9" * 5000, "integer string conversion"),
    ("seed=0x" + "f" * 5000, "seed=(int) must be"),
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
    ("schedule.drop_factors=None", "drop_factors=(None,)"),
    ("schedule.drop_factors=(1,(2,))", "drop_factors="),
    ("augment.flip=", "augment.flip"),
    ("model.name=", "model.name=''"),
    ("model.name=\x1b[2J\n", "is not known"),
    ("model.name=" + "x" * 100_000, "is not known"),
    ("model.depth[0]=1", "Did you mean 'model.depth'"),
    ("model=1", "is not known"),
    ("lr=0.1", "Did you mean 'optimizer.learning_rate'"),
    ("dataset.name=mnist", "imagenet2012, tfds/NAME."),
    ("=1", "is not known"),
    ("x" * 100_000 + "=1", "is not known"),
    ("dataset.data_dir=\0", "must be a local path"),
  ],
)
def test_overrides_that_cannot_be_used(override, message):
  assert message in refusal(f"--config.{override}")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "no --config: pass a config file"),
    (["--config=configs/v1_depth21.py"], "is not known"),
    (["--config"], "Missing value"),
    (
      ["--config.model.depth=20", f"--config={CONFIG}"],
      "before a value for --config",
    ),
    (["--cnofig=configs/v1_depth20.py"], "Unknown command line flag"),
    (["--model.depth=8"], "is set by --config.model.depth=VALUE"),
    (["--lr=0.1"], "is set by --config.optimizer.learning_rate=VALUE"),
    (["--config.seed=1"], "needs --config=FILE before it"),
    (["--mode=trian"], "trian"),
    (["configs/v1_depth20.py"], "unexpected argument 'configs/v1_depth20.py'"),
    (["--flagfile"], "--flagfile"),
    (["--help=nonsense"], "has this word. Parts: flags, run, dataset, augment"),
  ],
)
def test_arguments_that_cannot_be_used(arguments, message):
  assert message in refusal(*arguments, config=None)


@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests"])
def test_a_config_file_that_is_meant_is_named(folder, monkeypatch):
  monkeypatch.chdir(folder)
  message = refusal(config="quikstart")
  assert "--config=quikstart: there is no such file, and the name=" in message
  assert "Did you mean 'quickstart'? Known: base, cifar100" in message


@pytest.mark.parametrize(
  "path", ["configs/quickstart.py", "quickstart.py", "a/quickstart"]
)
def test_a_configuration_of_the_program_is_named(path, monkeypatch, tmp_path):
  """From a folder that has no such file."""
  monkeypatch.chdir(tmp_path)
  message = refusal(config=path)
  assert f"--config={path}: there is no such file." in message
  assert "The program has --config=quickstart." in message


def test_a_config_by_name(monkeypatch, tmp_path):
  """From any folder; a file of that name comes first."""
  monkeypatch.chdir(tmp_path)
  config, workdir = parse("--config.seed=3", config="quickstart")
  assert (config.dataset.name, config.seed) == ("digits", 3)
  assert workdir == "runs/quickstart,seed=3"
  (tmp_path / "quickstart").write_text(
    "from resnet_flax.configs.v1_depth20 import get_config\n"
  )
  assert parse(config="quickstart")[0].dataset.name == "cifar10"


def test_a_file_of_overrides_alone(tmp_path):
  path = tmp_path / "flags"
  path.write_text("--config.model.depth=32\n--workdir=runs/x\n")
  message = refusal(f"--flagfile={path}", config=None)
  assert message.startswith("--config.model.depth needs --config=FILE before")


def test_flags_from_a_file(tmp_path):
  path = tmp_path / "flags"
  path.write_text(f"--config={CONFIG}\n--config.model.depth=32\n")
  config, workdir = parse(f"--flagfile={path}", config=None)
  assert config.model.depth == 32
  assert workdir == "runs/v1_depth20,model.depth=32"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (
      f"--config={CONFIG}\n--config.model.depht=3",
      "Did you mean 'model.depth'",
    ),
    (
      "--config=configs/v1.py",
      "--config=configs/v1.py: there is no such file, and",
    ),
    ("\xff", "--flagfile: 'utf-8' codec can't decode"),
    (None, "No such file or directory"),
    ("folder", "Is a directory"),
  ],
)
def test_flag_files_that_cannot_be_used(tmp_path, text, message):
  path = tmp_path / "flags"
  if text == "folder":
    path.mkdir()
  elif text is not None:
    path.write_bytes(text.encode("latin-1"))
  assert message in refusal(f"--flagfile={path}", config=None)


def test_a_start_does_everything_once(tmp_path, monkeypatch):
  """One execution of the config file, one check, one network."""
  log = tmp_path / "log"
  path = tmp_path / "config.py"
  path.write_text(
    "from configs import quickstart\n"
    "def get_config():\n"
    f"  with open({str(log)!r}, 'a') as file:\n"
    "    file.write('executed ')\n"
    "  return quickstart.get_config()\n"
  )
  monkeypatch.setattr(rules, "check", lambda *_, **__: None)
  config, workdir = parse("--config.model.num_filters=4", config=path)
  monkeypatch.undo()
  assert workdir == "runs/config,model.num_filters=4"
  assert log.read_text() == "executed "
  counted = {
    function.__code__: 0
    for function in (rules.check_values, registry.create_model)
  }

  def count(frame, event, argument):
    del argument
    if event == "call" and frame.f_code in counted:
      counted[frame.f_code] += 1

  sys.setprofile(count)
  try:
    summary.summarize(config)
  finally:
    sys.setprofile(None)
  assert list(counted.values()) == [1, 1]


def test_help_has_every_flag_and_key(capsys):
  with pytest.raises(SystemExit) as caught:
    command_line.parse_flags(["resnet_flax.main", "--nonsense", "--help"])
  assert caught.value.code == 0
  assert "  --mode=train\n" in capsys.readouterr().out
  text = help_text.program_help("", "resnet_flax.main")
  lines = text.splitlines()
  assert max(map(len, lines)) <= 80
  for flag in (
    *("mode", "checkpoint", "workdir", "config", "coordinator_address"),
    *("num_processes", "process_id", "initialization_timeout"),
    "heartbeat_timeout",
  ):
    assert [ln for ln in lines if re.fullmatch(rf"  --{flag}(=\w+)?", ln)], flag
  words = " ".join(text.split())
  for key in config_keys.KEYS.values():
    assert re.search(rf"^  {re.escape(key.name)}(=|$)", text, re.MULTILINE)
    assert f"{key.meaning} Values: {key.values.requirement}." in words
  assert "  model.depth=20\n" in text
  assert "  augment.flip=true\n" in text
  assert "  schedule.drop_percents=40,60,80,90\n" in text
  assert "Read by vgg, alexnet." in words


@pytest.mark.parametrize("flag", ["--help", "-h", "-?", "--helpshort"])
def test_flags_that_ask_for_help(flag, capsys):
  with pytest.raises(SystemExit):
    command_line.parse_flags(["resnet_flax.main", f"{flag}=model.depth"])
  shown = [ln for ln in capsys.readouterr().out.splitlines() if ln[:3] == "  m"]
  assert shown == ["  model.depth=20"]
  # After -- everything is an argument.
  assert f"unexpected argument {flag!r}" in refusal("--", flag)


@pytest.mark.parametrize(
  ("word", "names"),
  [
    ("optimizer", [k for k in config_keys.KEYS if k.startswith("optimizer.")]),
    ("run", [k for k in config_keys.KEYS if "." not in k]),
    ("model.depth", ["model.depth"]),
    ("config.model.depth", ["model.depth"]),
    ("--workdir", ["--workdir"]),
    ("Gate_Bias", ["model.gate_bias"]),
    ("ArrayRecord", ["dataset.name"]),
  ],
)
def test_help_on_a_word(word, names):
  text = help_text.program_help(word, "resnet_flax.main")
  shown = re.findall(r"^  ([-\w.]+)(?:=.*)?$", text, re.MULTILINE)
  assert shown == names


@pytest.mark.parametrize(
  ("program", "has_keys"),
  [("resnet_flax.main", True), ("absl.logging", False)],
)
def test_only_programs_with_a_config_show_keys(program, has_keys):
  importlib.import_module(program)
  assert ("model.depth=" in help_text.program_help("", program)) == has_keys


def test_documentation_is_made_from_the_table():
  """If not: python -m resnet_flax.run.help_text > docs/configuration.md."""
  path = ROOT / "docs" / "configuration.md"
  assert path.read_text() == help_text.page()


TEXTS = st.one_of(
  st.text(max_size=12),
  st.from_regex(r"[-+]?[0-9_]{0,20}(\.[0-9]*)?(e[-+]?[0-9]{1,4})?"),
  st.text("()[]{},'\"0123456789.- \\\n\0", max_size=20),
  st.sampled_from(["nan", "inf", "-inf", "None", "True", "0x" + "f" * 5000]),
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
  st.lists(
    st.tuples(st.sampled_from(sorted(config_keys.KEYS)), TEXTS), max_size=3
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
    (
      "import no_such_module",
      "'no_such_module'. The program's own configs are",
    ),
    ("raise ValueError('my reason')", "my reason"),
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
      "seed=(int) must be",
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
  "content",
  [
    b"",
    b"x = 1",
    b"def get_config(:",
    b"\0" * 100,
    b"\xff\xfe",
    b"(" * 10_000,
    b"1/0",
    b"\x7fELF",
  ],
)
def test_config_files_that_are_none(tmp_path, content):
  path = tmp_path / "config.py"
  path.write_bytes(content)
  assert str(path) in refusal(config=path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_paths_that_are_no_config_file(tmp_path, make):
  path = tmp_path / "config.py"
  make(path)
  assert "is not known" in refusal(config=path)


@pytest.mark.parametrize("path", ["", "/dev/zero", "x\0y", "\ud800", "x" * 300])
def test_paths_that_lead_nowhere(path):
  assert "is not known" in refusal(config=path)


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
