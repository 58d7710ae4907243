"""Every configuration can be used, and every key of it is read."""

import importlib
import itertools
import pathlib

import pytest
from ml_collections import ConfigDict

from configs import base, he2015_depth20
from experiments.input_pipeline import generated
from resnet_flax import data as datasets, experiment, train
from resnet_flax.run import config as config_rules

FOLDER = pathlib.Path(base.__file__).parent
NAMES = sorted(
  path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__"
)


@pytest.mark.parametrize("name", NAMES)
def test_config_can_be_used(name):
  module = importlib.import_module(f"configs.{name}")
  config = module.get_config()
  config_rules.check(config, num_devices=1)
  assert config.is_locked
  experiment.build(config)
  if name != "base":
    # The docstring says where it comes from and how it is run.
    for word in ("Source:", "Expected:", "Cost:", "Command:"):
      assert word in module.__doc__
    command = f"python -m resnet_flax.main --config=configs/{name}.py"
    assert command in module.__doc__


def test_every_key_has_a_rule():
  declared = config_rules.flatten(base.get_config().to_dict())
  assert set(declared) == set(config_rules.RULES)
  assert set(config_rules.FREE_KEYS) < set(declared)


def test_every_key_has_a_comment():
  lines = pathlib.Path(base.__file__).read_text().splitlines()
  declared = 0
  for before, line in itertools.pairwise(lines):
    if line.startswith("  config.") and "ConfigDict" not in line:
      declared += 1
      assert before.startswith("  # "), line
  assert declared == len(config_rules.RULES)


class Recorder:
  """Notes which keys of a configuration are read, but for copying it."""

  def __init__(self, config, monkeypatch):
    self.read = set()
    self._paused = 0
    prefixes = {id(config): ""}
    prefixes |= {
      id(part): f"{name}."
      for name, part in config.items()
      if isinstance(part, ConfigDict)
    }
    self._config = config  # Keeps the ids from being used again.
    getitem, to_dict = ConfigDict.__getitem__, ConfigDict.to_dict

    def recording_getitem(part, key):
      if not self._paused and id(part) in prefixes:
        self.read.add(prefixes[id(part)] + str(key))
      return getitem(part, key)

    def silent_to_dict(part, *arguments, **keywords):
      # Checks and copies go over all keys; that is no use of any of them.
      self._paused += 1
      try:
        return to_dict(part, *arguments, **keywords)
      finally:
        self._paused -= 1

    monkeypatch.setattr(ConfigDict, "__getitem__", recording_getitem)
    monkeypatch.setattr(ConfigDict, "to_dict", silent_to_dict)


def keras_variant(config):
  config.dataset.validation_examples = 20
  config.plateau.enabled = True
  config.log.tensorboard = True


def paper_variant(config):
  paper = he2015_depth20.get_config()
  for part in ("model", "optimizer", "schedule", "augment"):
    config[part].update(paper[part])
  config.model.depth, config.model.num_filters = 8, 4
  config.schedule.warmup_min_depth = 8
  config.normalization = "channel"
  config.model.dtype = "bfloat16"


def cifar_variant(config):
  config.dataset.name = "cifar10"
  config.dataset.train_examples = 0
  config.model.update({"name": "resnet_v2", "depth": 11})
  config.augment.name = config.normalization = "none"


def test_every_key_is_read_and_no_other(
  tiny_config, tmp_path, monkeypatch, one_device
):
  """Over the union of the switches.

  Reading what is not declared raises by itself: configurations are locked.
  """
  from tests.data import archives

  archives.install(monkeypatch, "cifar10", tmp_path / "archive.tar.gz")
  read = set()
  for variant in (keras_variant, paper_variant, cifar_variant):
    config = ConfigDict(tiny_config.to_dict()).lock()
    config.num_epochs = 1
    config.dataset.archive = str(tmp_path / "archive.tar.gz")
    config.dataset.data_dir = str(tmp_path / "tfds")
    variant(config)
    with monkeypatch.context() as patch:
      recorder = Recorder(config, patch)
      workdir = tmp_path / variant.__name__
      train.train_and_evaluate(config, workdir, devices=one_device)
    read |= recorder.read
  for name, depth in [("highway", 8), ("resnet_imagenet", 50), ("vgg", 19)]:
    config = ConfigDict(tiny_config.to_dict()).lock()
    config.model.update({"name": name, "depth": depth, "num_filters": 0})
    config.model.input_size = 224
    with monkeypatch.context() as patch:
      recorder = Recorder(config, patch)
      experiment.build(config)
    read |= recorder.read
  generated.prepare(
    tmp_path / "streamed",
    {"train": 8, "validation": 4},
    num_classes=2,
    width=40,
    height=40,
  )
  config = ConfigDict(tiny_config.to_dict()).lock()
  config.normalization = "imagenet"
  config.dataset.update({"name": "imagenet2012", "image_size": 32})
  config.dataset.data_dir = str(tmp_path / "streamed")
  config.dataset.num_workers = config.dataset.train_examples = 0
  with monkeypatch.context() as patch:
    recorder = Recorder(config, patch)
    datasets.load(config.dataset, config.augment.name)
  read |= recorder.read
  parts = {key.partition(".")[0] for key in config_rules.RULES if "." in key}
  assert read - parts == set(config_rules.RULES)
