import pathlib

import pytest

from configs import base
from resnet_flax import load_model, train
from resnet_flax.data import prepared
from resnet_flax.run import (
  command_line,
  config as config_lib,
  errors,
  keys,
  load,
  rules,
)
from resnet_flax.tools import convert
from resnet_flax.tools.report import report


def test_unknown_name_suggests_the_nearest():
  error = errors.unknown_name("key", "depht", ["width", "depth"])
  expected = "key='depht' is not known. Did you mean 'depth'? Known: depth, wid"
  assert str(error).startswith(expected)


def test_unknown_name_suggests_nothing_far_away():
  error = errors.unknown_name("key", "xyz", ["width", "depth"])
  assert "Did you mean" not in str(error)


def test_an_extra_that_cannot_be_imported():
  with (
    pytest.raises(errors.ConfigError, match="no_such_module, which is not"),
    errors.extra("onnx", "x"),
  ):
    import no_such_module  # noqa: F401
  # For example one that was built for another version of NumPy.
  message = r"x needs onnx, which fails \(ImportError: wrong ABI\): pip install"
  with (
    pytest.raises(errors.ConfigError, match=message),
    errors.extra("onnx", "x"),
  ):
    raise ImportError("wrong ABI")


def test_an_address_of_an_object_says_nothing():
  error = ValueError("cannot identify <_io.BytesIO object at 0x7fc891f3a840>")
  expected = "ValueError: cannot identify <_io.BytesIO object>"
  assert errors.one_line(error) == expected


def test_a_message_is_one_line_whatever_it_names():
  error = errors.DataError("a b/é\n\x1b[2J\udcff\u2028.tar.gz is missing")
  expected = r"a b/é\n\x1b[2J\udcff\u2028.tar.gz is missing"
  assert str(error) == expected
  assert str(error).encode()


def test_a_name_of_any_length_is_shown_short_and_soon():
  error = errors.unknown_name("key", "x" * 10**6, ["width", "x" * 1000])
  assert len(str(error)) < 1300


# ---- Paths

# Whatever takes a path from a person, called with it.
TAKERS = {
  "train": lambda path: train.train_and_evaluate(base.get_config(), path),
  "load": load_model,
  "evaluate": load.evaluate_workdir,
  "convert from": lambda path: convert.convert(path, base.get_config(), "w"),
  "convert to": lambda path: convert.convert("w.pt", base.get_config(), path),
  "report of": lambda path: report.make([path], "out", "none"),
  "report to": lambda path: report.make(["runs"], path, "none"),
  "config file": lambda path: command_line._ConfigFile("config").parse(path),
} | {
  key.name: lambda path, name=key.name: rules.check(changed(name, path), 1)
  for key in config_lib.KEYS.values()
  if key.values is keys.PATH
}


def changed(name, value):
  config = base.get_config()
  config.update_from_flattened_dict({name: value})
  return config


# Of which `checkpoint.mirror` may have filled one; see mirror_test.py.
BUCKETS = ("gs://bucket/run", "s3://bucket/run")
READERS = ("load", "evaluate", "report of")
OTHERS = (
  *("hdfs://host/run", "file:///x/y", "https://host/w.pt", "gs:/bucket"),
  *("runs/gs:", "lags:/run", "C:\\runs\\a"),
)


@pytest.mark.parametrize(
  ("taker", "path"),
  [
    (taker, path)
    for taker in TAKERS
    for path in (*OTHERS, *BUCKETS)
    if path in OTHERS or taker not in READERS
  ],
)
def test_a_path_of_no_local_folder_is_refused(
  taker, path, tmp_path, monkeypatch
):
  """Pathlib would make folders of it here, and libraries go elsewhere."""
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.ConfigError, match="must be a local path"):
    TAKERS[taker](path)
  assert not list(tmp_path.iterdir())


def test_a_data_directory_of_the_environment_is_a_path_as_well(monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", "gs://tfds-data/datasets")
  with pytest.raises(errors.ConfigError, match="TFDS_DATA_DIR=gs:"):
    prepared.data_dir("")


@pytest.mark.parametrize("name", ["a:b", "gs", "lr=1:3", "gsx:y", "~x", "é #%"])
def test_other_names_are_paths(name):
  assert errors.local_path(name, "workdir") == pathlib.Path(name)


@pytest.mark.parametrize(
  "taker", [each for each in TAKERS if each not in config_lib.KEYS]
)
def test_the_home_is_written_as_a_tilde(taker, tmp_path, monkeypatch):
  """A shell leaves it alone in --flag=~/x."""
  home, here = tmp_path / "home", tmp_path / "here"
  home.mkdir()
  here.mkdir()
  # As a workdir it cannot be used, as what is read it is not there.
  (home / "file").write_text("")
  monkeypatch.setenv("HOME", str(home))
  monkeypatch.chdir(here)
  with pytest.raises(errors.UserError) as caught:
    TAKERS[taker]("~/file/x")
  assert f"{home}/file/x" in str(caught.value) or taker == "report to"
  assert not list(here.iterdir())


@pytest.mark.parametrize("key", ["data_dir", "init_from"])
def test_keys_take_a_tilde_for_the_home(key, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  if key == "data_dir":
    (tmp_path / "x").mkdir()
    assert prepared.data_dir("~/x") == tmp_path / "x"
  else:
    with pytest.raises(errors.WorkdirError, match=str(tmp_path / "x")):
      load.load_source(changed(key, "~/x"))


def test_resolve(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert errors.resolve("~/x") == tmp_path / "x"
  monkeypatch.chdir(tmp_path)
  assert errors.resolve("x y/é") == tmp_path / "x y" / "é"
  # Opening these says what is wrong.
  assert errors.resolve("~no_such_user/x").name == "x"
  (tmp_path / "circle").symlink_to(tmp_path / "circle")
  assert errors.resolve("circle") == tmp_path / "circle"
