"""An export folder is complete or absent."""

import dataclasses
import importlib.util
import json
import re
import shlex
import sys

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

import resnet_flax
from resnet_flax import train
from resnet_flax.run import errors, metrics
from resnet_flax.tools import convert
from resnet_flax.tools.export import card, command, programs, weights
from resnet_flax.tools.report import runs
from tests.helpers import ROOT, run_module
from tests.tools.weights import networks

BESIDE = {"README.md", "preprocess.json", "labels.txt", "check.npz"}


@pytest.fixture
def converted(tiny_config, tmp_path):
  """(workdir, config) of a CIFAR ResNet that PyTorch has saved."""
  source = networks.save(
    networks.cifar_state_dict(), tmp_path / "first.safetensors"
  )
  config = networks.for_cifar(tiny_config)
  convert.convert(source, config, tmp_path / "run")
  return tmp_path / "run", config


@pytest.mark.slow
def test_a_mirror_goes_out(trained, mirrored, tmp_path):
  for name, workdir in (("a", trained), ("b", mirrored)):
    command.export(workdir, tmp_path / name, "safetensors", names="flax")
  a, b = ((tmp_path / x / "weights.safetensors").read_bytes() for x in "ab")
  assert a == b


def names_in(folder):
  return {path.name for path in folder.iterdir()}


def test_in_and_out_and_in(converted, tmp_path):
  workdir, config = converted
  out = tmp_path / "out"
  title = command.export(workdir, out, "safetensors", licence="CC0-1.0")
  assert title == "a PyTorch CIFAR ResNet-8 with option A shortcuts"
  assert names_in(out) == BESIDE | {"weights.safetensors"}
  assert out.stat().st_mode & 0o777 == 0o755
  there = safetensors_numpy.load_file(out / "weights.safetensors")
  given = networks.cifar_state_dict()
  for name, array in there.items():
    np.testing.assert_array_equal(array, given[name])
  assert given.keys() - there.keys() == {
    name for name in given if name.endswith("num_batches_tracked")
  }
  convert.convert(out / "weights.safetensors", config, tmp_path / "again")
  jax.tree.map(
    np.testing.assert_array_equal,
    resnet_flax.load_model(tmp_path / "again").variables,
    resnet_flax.load_model(workdir).variables,
  )
  card = (out / "README.md").read_text()
  assert "| licence | CC0-1.0 |" in card
  assert "| test accuracy | not scored |" in card
  assert card.startswith(f"# {title}\n")
  assert f"recipe | from {title}, not trained on |" in card


def prepared(out, images):
  """Images as preprocess.json says, by NumPy alone."""
  said = json.loads((out / "preprocess.json").read_text())
  mean = said["mean"]
  mean = np.load(out / mean) if isinstance(mean, str) else np.array(mean)
  assert said["image_size"] == said["size"] == [32, 32]
  x = (np.float32(images) / 255 - mean) / np.array(said["std"])
  x = x[..., ::-1] if said["channels"] == "BGR" else x
  return np.float32(x), said


def test_of_a_run_of_two_seeds(of_two_seeds, tmp_path):
  records = metrics.MetricsLog(of_two_seeds).read()
  out = tmp_path / "out"
  title = command.export(of_two_seeds, out, "keras", which="latest", seed=1)
  assert title == "the Keras example's ResNet-8 v1"
  assert names_in(out) == BESIDE | {"model.weights.h5", "mean.npy"}
  loaded = resnet_flax.load_model(of_two_seeds, "latest", seed=1)
  check = np.load(out / "check.npz")
  assert check["images"].shape == (8, 32, 32, 3)
  x, said = prepared(out, check["images"])
  assert (said["layout"], said["mean"]) == ("NHWC", "mean.npy")
  ours = loaded.model.apply(loaded.variables, x, train=False)
  np.testing.assert_allclose(check["logits"], ours, rtol=1e-4, atol=1e-5)
  assert (out / "labels.txt").read_text().split() == list("0123456789")
  card = (out / "README.md").read_text()
  own = records[-1]["seeds"][1]["test_accuracy"]
  assert f"| {own:.2%} on 360 images; n = 2 seeds" in card
  best = [
    max(record["seeds"][k]["test_accuracy"] for record in records)
    for k in range(2)
  ]
  assert (
    f"by test_accuracy: {np.mean(best):.2%} ± {np.std(best, ddof=1):.2%}"
    in card
  )
  assert "2 epochs of batches of 8" in card
  assert "| licence | not stated |" in card
  with pytest.raises(errors.ConfigError, match="seed=7 was not trained"):
    command.export(of_two_seeds, tmp_path / "other", "keras", seed=7)


def card_of(workdir, out, **changes):
  """The files beside the weights of a network that is changed so."""
  out.mkdir()
  loaded = resnet_flax.load_model(workdir, "latest")
  loaded = dataclasses.replace(loaded, **changes)
  card.write(out, loaded, workdir, "keras", "a network", "\udce9")
  return (out / "README.md").read_text(), (out / "labels.txt").read_text()


def test_any_name_of_a_class_is_a_line(of_two_seeds, tmp_path):
  """Folders' names may have line breaks and bytes that are not text."""
  names = ("caf\udce9", "a\nb", *"cdefghij")
  text, labels = card_of(of_two_seeds, tmp_path / "out", class_names=names)
  assert labels.splitlines() == [r"caf\udce9", r"a\nb", *"cdefghij"]
  assert r"| licence | \udce9 |" in text
  assert "on 360 images; n = 2 seeds" in text


def test_the_card_says_only_what_was_scored(
  of_two_seeds, tmp_path, monkeypatch
):
  config = resnet_flax.load_model(of_two_seeds, "latest").config
  config.dataset.bad_images = "skip"  # How many, records do not say.
  # An average that begins after the best epochs.
  none = [float("nan")] * 2
  monkeypatch.setattr(runs.Group, "at", lambda *_: none)
  text, _ = card_of(of_two_seeds, tmp_path / "out", config=config)
  assert re.search(
    r"\| test accuracy \| \d+.\d\d% on up to 360 images \|", text
  )


def test_the_card_names_the_views_that_were_scored(of_two_seeds, tmp_path):
  config = resnet_flax.load_model(of_two_seeds, "latest").config
  config.dataset.test_crops = 2
  text, _ = card_of(of_two_seeds, tmp_path / "out", config=config)
  assert "on 360 images by the mean of 2 views of each; n = 2" in text


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({}, "augmentation: flip True, name shift_flip;"),
    ({"name": "none"}, "augmentation: name none;"),
    (
      {"alternating_flip": True},
      "augmentation: alternating_flip True, name shift_flip;",
    ),
  ],
)
def test_the_card_has_the_augmentation_that_was_made(
  of_two_seeds, tmp_path, changes, expected
):
  config = resnet_flax.load_model(of_two_seeds, "latest").config
  config.augment.update(changes)
  assert expected in card_of(of_two_seeds, tmp_path / "out", config=config)[0]


def refused(kind, converted, tmp_path, *arguments, **more):
  before = names_in(tmp_path)
  with pytest.raises(kind) as raised:
    command.export(converted[0], tmp_path / "out", *arguments, **more)
  assert names_in(tmp_path) == before
  assert len(str(raised.value).splitlines()) == 1
  return str(raised.value)


def test_what_there_is_instead(converted, tmp_path):
  message = refused(errors.ConfigError, converted, tmp_path, "keras")
  assert message == (
    "--format=keras cannot hold this network: the network has 7 convolutions."
    " A ResNet v1 of the Keras example must have 6n+3, for n blocks in each"
    " stage. Pass --format=safetensors (with --names=flax), orbax or stablehlo"
    " for any network, or --format=onnx for any network without group norm."
  )
  message = refused(
    errors.ConfigError, converted, tmp_path, "orbax", "torchvision"
  )
  assert "--format=orbax has no --names=torchvision; it has: flax." in message


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_what_is_an_extra_is_named(converted, tmp_path, monkeypatch, form):
  monkeypatch.setitem(sys.modules, form, None)
  message = refused(errors.ConfigError, converted, tmp_path, form)
  assert f"pip install 'resnet_flax[{form}]'" in message
  assert "cannot be written" not in message


def test_h5py_is_needed_for_keras_alone(converted, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "h5py", None)
  # It is imported anew.
  monkeypatch.delitem(sys.modules, weights.__name__)
  monkeypatch.delattr(weights.__name__)
  command.export(converted[0], tmp_path / "flax", "safetensors", "flax")


def test_programs_are_written_by_their_module(converted, tmp_path, monkeypatch):
  def write_onnx(loaded, folder):
    (folder / "model.onnx").write_text(str(loaded.step))

  monkeypatch.setattr(programs, "write_onnx", write_onnx)
  command.export(converted[0], tmp_path / "out", "onnx")
  assert names_in(tmp_path / "out") == BESIDE | {"model.onnx"}


def test_nothing_is_overwritten(converted, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").touch()
  message = refused(errors.WorkdirError, converted, tmp_path, "safetensors")
  assert "must be a new or an empty folder" in message
  assert names_in(tmp_path / "out") == {"mine"}


def test_a_failed_write_leaves_nothing(converted, tmp_path, monkeypatch):
  def fail(*arguments, **more):
    raise ValueError("the disk\nis gone")

  monkeypatch.setattr(np, "savez", fail)
  with pytest.raises(ValueError, match="is gone"):
    command.export(converted[0], tmp_path / "out", "safetensors")
  assert not (tmp_path / "out").exists()
  monkeypatch.setattr(safetensors_numpy, "save_file", fail)
  message = refused(errors.WorkdirError, converted, tmp_path, "safetensors")
  assert "the disk is gone" in message


@pytest.mark.parametrize("form", ["safetensors", "keras", "orbax"])
def test_a_full_disk(small_disk, form, trained):
  small_disk.fill()
  with pytest.raises(errors.WorkdirError, match="Nothing was left there"):
    command.export(trained, small_disk.folder / "out", form)
  assert names_in(small_disk.folder) == {"filler"}


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "the following arguments are required: workdir"),
    (["run", "--format=safetensor", "--out=o"], "invalid choice: 'safetensor'"),
    (["run", "--format=keras", "--out=o"], "run/config.json does not exist"),
    (["run", "--format=orbax", "--out=gs://o"], "--out=gs://o must be"),
  ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path):
  result = run_module("resnet_flax.export", *arguments, cwd=tmp_path)
  assert result.returncode in (1, 2)
  assert result.stdout == ""
  (line,) = result.stderr.splitlines()
  assert line.startswith("error: ")
  assert message in line
  assert not names_in(tmp_path)


@pytest.mark.slow
def test_the_commands_of_the_page(
  converted, make_tiny_config, tmp_path, one_device
):
  """Those of docs/use.md, on runs of their names."""
  runs = tmp_path / "runs"
  train.train_and_evaluate(
    make_tiny_config(tmp_path / "cache"), runs / "keras20", devices=one_device
  )
  converted[0].rename(runs / "for_pytorch")
  page = (ROOT / "docs" / "use.md").read_text()
  commands = re.findall(r"^python -m (resnet_flax\.export .*)$", page, re.M)
  assert len(commands) >= 4
  for line in commands:
    if "--format=torch" in line and not importlib.util.find_spec("torch"):
      continue
    result = run_module(*shlex.split(line), cwd=tmp_path)
    assert result.returncode == 0, (line, result.stderr)
    assert result.stdout.startswith("Network: ")
