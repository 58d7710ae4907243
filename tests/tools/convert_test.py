"""From a file to a workdir that is scored, loaded and trained on."""

import io
import json
import os
import signal
import zipfile

import jax
import numpy as np
import pytest

import resnet_flax
from resnet_flax import train
from resnet_flax.run import errors, load as inference, signals
from resnet_flax.tools import convert
from tests.helpers import run_module
from tests.tools.weights import networks


@pytest.fixture
def config(tiny_config):
  return networks.for_cifar(tiny_config)


@pytest.fixture
def source(tmp_path):
  state = networks.cifar_state_dict()
  return networks.save(state, tmp_path / "weights.safetensors")


def changed(source, name, array):
  """The file with an array replaced, or left out."""
  state = networks.cifar_state_dict()
  state[name] = array
  state = {k: v for k, v in state.items() if v is not None}
  return networks.save(state, source.with_name("changed.safetensors"))


def refused(source, config, workdir, kind=errors.WeightsError):
  """The message of a conversion that fails and leaves nothing."""
  before = sorted(source.parent.iterdir())
  with pytest.raises(kind) as raised:
    convert.convert(source, config, workdir)
  assert sorted(source.parent.iterdir()) == before
  assert len(str(raised.value).splitlines()) == 1
  return str(raised.value)


def test_workdir_holds_what_a_run_has(source, config, tmp_path):
  done = convert.convert(source, config, tmp_path / "run")
  assert done.title == "a PyTorch CIFAR ResNet-8 with option A shortcuts"
  assert (done.num_arrays, len(done.passed_over)) == (37, 7)
  names = {path.name for path in (tmp_path / "run").iterdir()}
  assert names == {"checkpoints", "config.json", "environment.json"}
  assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755
  stored = json.loads((tmp_path / "run" / "environment.json").read_text())
  assert stored["converted"]["source"] == "weights.safetensors"
  assert len(stored["converted"]["sha256"]) == 64
  assert stored["data"] is None
  loaded = resnet_flax.load_model(tmp_path / "run")
  assert loaded.step == 0
  state = networks.cifar_state_dict()
  np.testing.assert_array_equal(
    loaded.variables["params"]["stem_conv"]["kernel"],
    np.transpose(state["conv1.weight"], (2, 3, 1, 0)),
  )
  images = np.zeros((3, 32, 32, 3), np.uint8)
  assert loaded.predict(images).shape == (3, 10)


def test_scored_and_trained_on(source, config, tmp_path, one_device):
  """A converted workdir acts as a run that has not begun."""
  workdir = tmp_path / "run"
  convert.convert(source, config, workdir)
  scores = inference.evaluate_workdir(workdir, devices=one_device)
  assert scores.keys() == {"loss", "accuracy", "top5", "step"}
  assert scores["step"] == 0
  before = inference.load_model(workdir).variables["params"]
  # So small that the weights stay what they were; it may not differ, so the
  # stored one is set to it.
  config.optimizer.learning_rate, config.num_epochs = 1e-30, 1
  (workdir / "config.json").write_text(json.dumps(config.to_dict()))
  records = train.train_and_evaluate(config, workdir, devices=one_device)
  assert [record["epoch"] for record in records] == [0]
  loaded = inference.load_model(workdir)
  assert loaded.step == records[-1]["step"]
  jax.tree.map(
    np.testing.assert_array_equal, before, loaded.variables["params"]
  )
  stored = json.loads((workdir / "environment.json").read_text())
  assert stored["data"] == "digits"
  assert stored["converted"]["source"] == "weights.safetensors"
  assert loaded.class_names == tuple("0123456789")
  # And again, now that there is data to compare with.
  assert (
    train.train_and_evaluate(config, workdir, devices=one_device) == records
  )


def test_measured_normalization(source, config, tmp_path):
  config.normalization = "channel"
  convert.convert(source, config, tmp_path / "run")
  stored = json.loads((tmp_path / "run" / "environment.json").read_text())
  assert stored["data"] == "digits"


def test_same_with_parallel_prefix(source, config, tmp_path):
  wrapped = {
    f"module.{name}": array
    for name, array in networks.cifar_state_dict().items()
  }
  path = networks.save(wrapped, tmp_path / "wrapped.safetensors")
  convert.convert(path, config, tmp_path / "wrapped")
  convert.convert(source, config, tmp_path / "plain")
  jax.tree.map(
    np.testing.assert_array_equal,
    resnet_flax.load_model(tmp_path / "wrapped").variables,
    resnet_flax.load_model(tmp_path / "plain").variables,
  )


def test_other_classes(config, tmp_path):
  state = networks.cifar_state_dict(classes=7)
  source = networks.save(state, tmp_path / "a.safetensors")
  done = convert.convert(source, config, tmp_path / "run")
  assert done.config.model.num_classes == 7
  assert config.model.num_classes == 0
  loaded = resnet_flax.load_model(tmp_path / "run")
  assert loaded.predict(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 7)
  config.model.num_classes = 10
  message = refused(source, config, tmp_path / "other", errors.ConfigError)
  assert "must be 0 or 7, the number of classes" in message
  # Another run can start from it, with a new head.
  config.init_from = str(tmp_path / "run")
  assert "head" not in inference.load_source(config)["params"]


@pytest.mark.parametrize(
  ("name", "array", "message"),
  [
    (
      "more.weight",
      np.ones((2, 3), np.float32),
      "Left over: more.weight[2, 3]",
    ),
    (
      "layer2.0.bn1.bias",
      None,
      "Missing: layer2.0.bn1.bias[8] for params/stage2_block1/bn1/bias",
    ),
    (
      "layer2.0.conv1.weight",
      np.ones((8, 4, 1, 1), np.float32),
      "Left over: layer2.0.conv1.weight[8, 4, 1, 1]. Missing:"
      " layer2.0.conv1.weight[8, 4, 3, 3] for"
      " params/stage2_block1/conv1/kernel.",
    ),
    ("bn1.running_var", -np.ones(4, np.float32), "variances of at least 0"),
    ("bn1.bias", np.full(4, np.inf, np.float32), "finite in float32"),
    ("linear.weight", None, "must hold a known network"),
    (
      "linear.weight",
      np.ones(1, np.float32),
      "linear.weight[1, 16] for params/head/kernel",
    ),
    (
      "conv1.weight",
      np.ones(4, np.float32),
      "Left over: conv1.weight[4]. Missing: conv1.weight[4, 3, 3, 3]",
    ),
  ],
)
def test_arrays_that_do_not_fit(source, config, tmp_path, name, array, message):
  path = changed(source, name, array)
  assert message in refused(path, config, tmp_path / "run")


def test_a_head_that_no_configuration_has(source, config, tmp_path):
  path = changed(source, "linear.weight", np.ones((10**6 + 1, 1), np.float32))
  message = refused(path, config, tmp_path / "run", errors.ConfigError)
  assert "model.num_classes=1000001 must be an integer" in message


def keras_file(path, layer):
  """A .keras file of the example's ResNet-8 whose first layer is given."""
  h5py = pytest.importorskip("h5py")
  buffer = io.BytesIO()
  with h5py.File(buffer, "w") as file:
    # The stem, two convolutions in each stage, two projections.
    for k in range(9):
      name = "conv2d" + f"_{k}" * (k > 0)
      file[f"layers/{name}/vars/0"] = np.ones((3, 3, 1, 1), np.float32)
    file["layers/dense/vars/0"] = np.ones((1, 1), np.float32)
  stem = {
    "strides": [1, 1],
    "padding": "same",
    "epsilon": 1e-3,
    "name": "conv2d",
  }
  settings = {k: v for k, v in (stem | layer[1]).items() if v != "absent"}
  layers = [{"class_name": layer[0], "config": settings}]
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("config.json", json.dumps({"config": {"layers": layers}}))
    archive.writestr("model.weights.h5", buffer.getvalue())
  return path


@pytest.mark.parametrize(
  "layer",
  [
    ("Conv2D", {"strides": "absent"}),
    ("Conv2D", {"padding": "absent"}),
    ("BatchNormalization", {"epsilon": "absent"}),
    ("BatchNormalization", {"epsilon": None}),
    ("BatchNormalization", {"epsilon": "small"}),
  ],
)
def test_layers_that_are_not_described(layer, config, tmp_path):
  path = keras_file(tmp_path / "a.keras", layer)
  message = refused(path, config, tmp_path / "run")
  assert "its layers are not described as in files of keras" in message


def test_null_is_no_stride(config, tmp_path):
  path = keras_file(tmp_path / "a.keras", ("Conv2D", {"strides": None}))
  message = refused(path, config, tmp_path / "run")
  assert "has the strides None, which must be [1, 1]" in message


@pytest.mark.parametrize(
  ("key", "value", "needed"),
  [
    ("model.name", "plain", "--config.model.name=resnet_v1 (now plain)"),
    ("model.depth", 14, "--config.model.depth=8 (now 14)"),
    ("model.num_filters", 8, "--config.model.num_filters=4 (now 8)"),
    ("model.shortcut", "B", "--config.model.shortcut=A (now B)"),
    ("model.padding", "same", "--config.model.padding=symmetric (now same)"),
    ("model.conv_bias", True, "--config.model.conv_bias=false (now true)"),
    ("model.norm", "none", "--config.model.norm=batch_norm (now none)"),
    (
      "model.batch_norm_epsilon",
      1e-3,
      "--config.model.batch_norm_epsilon=1e-05 (now 0.001)",
    ),
    (
      "normalization",
      "pixel_mean",
      "--config.normalization=imagenet (now pixel_mean)",
    ),
  ],
)
def test_configurations_of_another_function(
  source, config, tmp_path, key, value, needed
):
  """Shapes do not show most of these differences."""
  overrides = {key: value}
  if value == "plain":
    overrides["model.shortcut"] = "none"
  config.update_from_flattened_dict(overrides)
  assert needed in refused(source, config, tmp_path / "run", errors.ConfigError)


def test_init_from_is_no_second_source(source, config, tmp_path):
  config.init_from = "elsewhere"
  message = refused(source, config, tmp_path / "run", errors.ConfigError)
  assert "init_from=elsewhere" in message


def test_nothing_is_overwritten(source, config, tmp_path):
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "notes.txt").write_text("mine")
  message = refused(source, config, workdir, errors.WorkdirError)
  assert "must be a new or an empty folder" in message
  (workdir / "notes.txt").unlink()
  convert.convert(source, config, workdir)
  message = refused(source, config, workdir, errors.WorkdirError)
  assert "must be a new or an empty folder" in message
  message = refused(source, config, source, errors.WorkdirError)
  assert "Not a directory" in message


def test_a_link_to_a_folder(source, config, tmp_path):
  """What it leads to becomes the workdir; the link stays."""
  folder, link = tmp_path / "folder", tmp_path / "link"
  folder.mkdir()
  link.symlink_to(folder)
  convert.convert(source, config, link)
  assert link.is_symlink()
  assert (folder / "config.json").exists()
  assert resnet_flax.load_model(link).step == 0
  loop = tmp_path / "loop"
  loop.symlink_to(loop)
  message = refused(source, config, loop, errors.WorkdirError)
  assert "cannot be written" in message


def test_a_failed_write_leaves_nothing(source, config, tmp_path, monkeypatch):
  def fail(*arguments):
    raise OSError("the disk is gone")

  monkeypatch.setattr(convert.checkpoint.Checkpoints, "save", fail)
  message = refused(source, config, tmp_path / "run", errors.WorkdirError)
  assert "the disk is gone" in message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["write_json", "save", "check"])
def test_a_signal_leaves_nothing(
  source, config, tmp_path, monkeypatch, ctrl_c, name, number
):
  """Whenever it comes; threads that still write would fill the folder again."""
  place = {
    "write_json": convert.files_lib,
    "save": convert.checkpoint.Checkpoints,
    "check": signals.StopSignals,
  }[name]
  function = getattr(place, name)

  def interrupted(*arguments):
    signal.raise_signal(number)
    return function(*arguments)

  monkeypatch.setattr(place, name, interrupted)
  with pytest.raises(signals.Stopped) as caught:
    convert.convert(source, config, tmp_path / "run")
  assert caught.value.number == number
  assert os.listdir(tmp_path) == [source.name]


def test_what_a_killed_conversion_left_is_cleared(source, config, tmp_path):
  (tmp_path / ".unfinished-run-abcdefg1" / "unfinished").mkdir(parents=True)
  # Another command may be writing this folder.
  (tmp_path / ".unfinished-run-x-abcdefg1").mkdir()
  convert.convert(source, config, tmp_path / "run")
  assert sorted(os.listdir(tmp_path)) == [
    *(".unfinished-run-x-abcdefg1", "run", source.name)
  ]


def test_a_full_disk(small_disk, source, config):
  small_disk.fill()
  with pytest.raises(errors.WorkdirError, match="Nothing was left there"):
    convert.convert(source, config, small_disk.folder / "run")
  assert [path.name for path in small_disk.folder.iterdir()] == ["filler"]


def test_someone_else_fills_the_workdir(source, config, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  rename = os.rename

  def late(old, new):
    workdir.mkdir()
    (workdir / "theirs").touch()
    rename(old, new)

  monkeypatch.setattr(convert.os, "rename", late)
  with pytest.raises(errors.WorkdirError, match="cannot be written"):
    convert.convert(source, config, workdir)
  assert [path.name for path in workdir.iterdir()] == ["theirs"]


def run(*arguments, module="convert"):
  return run_module(f"resnet_flax.{module}", *arguments)


FLAGS = [
  "--config=configs/quickstart.py",
  "--config.model.num_filters=4",
  "--config.model.shortcut=A",
  "--config.model.padding=symmetric",
  "--config.model.conv_bias=false",
  "--config.model.batch_norm_epsilon=1e-5",
  "--config.normalization=imagenet",
]


@pytest.mark.slow
def test_command_line(source, tmp_path):
  workdir = f"--workdir={tmp_path}/run"
  result = run(f"--source={source}", *FLAGS, workdir)
  assert result.returncode == 0, result.stderr
  assert result.stdout.splitlines() == [
    "Source: a PyTorch CIFAR ResNet-8 with option A shortcuts",
    "Arrays: 37 used, each once; 7 skipped that are not weights",
    f"Workdir: {tmp_path}/run",
  ]
  scored = run("--mode=eval", workdir, module="main")
  lines = scored.stdout.splitlines()
  assert lines[0] == "Checkpoint: best, step 0, before training"
  assert lines[1].startswith("Test loss: ")
  again = run(f"--source={source}", *FLAGS, workdir)
  assert again.returncode == 1
  assert again.stdout == ""
  (line,) = again.stderr.splitlines()
  assert line.startswith(f"error: --workdir={tmp_path}/run must be a new")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "--source must be"),
    (["--source=a.safetensors"], "no --config"),
    (["--source=missing.h5", *FLAGS], "missing.h5 cannot be read"),
    (["--source=a.h5", "--cnofig=b"], "Unknown command line flag"),
  ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path):
  result = run(*arguments, f"--workdir={tmp_path}/run")
  assert result.returncode in (1, 2)
  assert result.stdout == ""
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: ")
  assert message in line
  assert not (tmp_path / "run").exists()
