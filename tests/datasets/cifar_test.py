import json
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from configs import base
from resnet_flax import errors
from resnet_flax.datasets import cache, cifar, loading
from tests.datasets import archives


@pytest.fixture
def config(tmp_path):
  config = base.get_config().dataset
  config.data_dir = str(tmp_path / "tfds")
  config.cache_dir = str(tmp_path / "cache")
  return config


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_from_archive_to_arrays(name, config, monkeypatch, tmp_path):
  path = tmp_path / "archive with spaces é.tar.gz"
  images, labels = archives.install(monkeypatch, name, path)
  config.name, config.archive = name, str(path)
  dataset = loading.load(config)
  train_images, train_labels = dataset.train.take(np.arange(len(dataset.train)))

  # TFDS shuffles as it prepares: compare as sets of (image, label).
  def key(image, label):
    return image.tobytes(), int(label)

  found = set(map(key, train_images, train_labels))
  assert found == set(map(key, images["train"], labels["train"]))
  assert len(dataset.test) == len(labels["test"])
  assert dataset.class_names[3] == "class_3"
  assert isinstance(dataset.train.images, np.memmap)

  # Once prepared, the archive is not needed; once cached, nor is decoding.
  path.unlink()
  monkeypatch.setattr(cifar, "read", None)
  again = loading.load(config)
  np.testing.assert_array_equal(again.train.images, dataset.train.images)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_from_download_to_arrays(name, config, monkeypatch, server):
  folder, url = server
  file = f"{name}-binary.tar.gz"
  _, labels = archives.install(
    monkeypatch, name, folder / file, f"{url}/{file}"
  )
  config.name = name
  dataset = loading.load(config)
  assert sorted(dataset.train.labels) == sorted(labels["train"])
  assert dataset.source.startswith(f"{name}-3.0.2-")


def test_prepared_copy_is_plain_tfds(config, monkeypatch, tmp_path):
  """What is written is the stock data set: TFDS itself opens it by name."""
  import tensorflow_datasets as tfds

  path = tmp_path / "archive.tar.gz"
  archives.install(monkeypatch, "cifar10", path)
  cifar.prepare("cifar10", pathlib.Path(config.data_dir), str(path))
  source = tfds.data_source(
    "cifar10",
    split="test",
    data_dir=config.data_dir,
    builder_kwargs={"file_format": "array_record"},
  )
  assert len(source) == archives.IMAGES_PER_FILE
  assert source[0]["image"].shape == (32, 32, 3)


def test_two_copies_of_one_version_have_two_caches(
  config, monkeypatch, tmp_path
):
  path = tmp_path / "archive.tar.gz"
  archives.install(monkeypatch, "cifar10", path)
  config.archive = str(path)
  loading.load(config)
  folder = cifar.find_prepared("cifar10", pathlib.Path(config.data_dir))
  before = cifar.fingerprint(folder)
  (folder / "label.labels.txt").write_text("\n".join("abcdefghij"))
  assert cifar.fingerprint(folder) != before
  assert loading.load(config).class_names[0] == "a"
  assert len(list(pathlib.Path(config.cache_dir).iterdir())) == 2


def test_damaged_copy_is_one_line(config, monkeypatch, tmp_path):
  path = tmp_path / "archive.tar.gz"
  archives.install(monkeypatch, "cifar10", path)
  config.archive = str(path)
  folder = cifar.prepare("cifar10", pathlib.Path(config.data_dir), str(path))
  for record_file in folder.glob("*array_record*"):
    record_file.write_bytes(b"")
  with pytest.raises(errors.DataError, match="Delete it"):
    loading.load(config)


def fake_version(root, version, file_format):
  folder = root / "cifar10" / version
  folder.mkdir(parents=True)
  info = {"name": "cifar10"}
  if file_format:
    info["fileFormat"] = file_format
  (folder / "dataset_info.json").write_text(json.dumps(info))
  return folder


def test_newest_array_record_version_is_found(tmp_path):
  fake_version(tmp_path, "3.0.2", "array_record")
  newest = fake_version(tmp_path, "3.0.10", "array_record")
  fake_version(tmp_path, "4.0.0", "tfrecord")
  fake_version(tmp_path, "incomplete.3.1.0", "array_record")
  assert cifar.find_prepared("cifar10", tmp_path) == newest


@pytest.mark.parametrize("file_format", ["tfrecord", None])
def test_tfrecord_gets_a_clear_message(tmp_path, file_format):
  fake_version(tmp_path, "3.0.2", file_format)
  with pytest.raises(errors.DataError, match="as tfrecord, which needs Tensor"):
    cifar.find_prepared("cifar10", tmp_path)


def test_nothing_prepared(tmp_path):
  assert cifar.find_prepared("cifar10", tmp_path / "missing") is None


def test_data_dir(monkeypatch, tmp_path):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "from_environment"))
  assert cifar.data_dir("").name == "from_environment"
  assert cifar.data_dir(str(tmp_path / "configured")).name == "configured"
  monkeypatch.delenv("TFDS_DATA_DIR")
  assert cifar.data_dir("") == pathlib.Path.home() / "tensorflow_datasets"


def test_unwritable_data_dir(config, monkeypatch, tmp_path):
  path = tmp_path / "archive.tar.gz"
  archives.install(monkeypatch, "cifar10", path)
  blocked = tmp_path / "a_file"
  blocked.write_text("")
  with pytest.raises(errors.DataError, match="cannot be prepared"):
    cifar.prepare("cifar10", blocked / "tfds", str(path))


def test_tensorflow_is_never_imported(tmp_path):
  """From the archive to a trained network, though one is installed."""
  program = """
    import dataclasses, pathlib, sys
    import pytest
    from configs import base
    from tests.datasets import archives

    folder = pathlib.Path(sys.argv[1])
    package = folder / "installed" / "tensorflow"
    package.mkdir(parents=True)
    text = "raise AssertionError('tensorflow is imported')"
    (package / "__init__.py").write_text(text)
    sys.path.insert(0, str(package.parent))
    patch = pytest.MonkeyPatch()
    archives.install(patch, "cifar10", folder / "archive.tar.gz")
    config = base.get_config()
    config.dataset.archive = str(folder / "archive.tar.gz")
    config.dataset.data_dir = str(folder / "tfds")
    config.dataset.cache_dir = str(folder / "cache")
    config.batch_size = config.model.num_filters = 4
    config.model.depth, config.num_epochs = 8, 1
    from resnet_flax import train
    train.train_and_evaluate(config, folder / "run")
    assert "tensorflow" not in sys.modules
    print("trained")
  """
  result = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.stdout.endswith("trained\n"), result.stderr
  assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_real_cifar10(cifar_data_dir):
  folder = cifar.find_prepared("cifar10", pathlib.Path(cifar_data_dir))
  config = base.get_config().dataset
  config.data_dir = cifar_data_dir
  # The user's own cache: decoding takes 20 s.
  dataset = loading.load(config)
  assert len(dataset.train) == 50_000
  assert len(dataset.test) == 10_000
  assert (np.bincount(dataset.train.labels) == 5_000).all()
  assert (np.bincount(dataset.test.labels) == 1_000).all()
  assert dataset.class_names[-1] == "truck"
  mean = dataset.train.images[:1000].mean() / 255
  assert 0.45 < mean < 0.5
  entry = f"cifar10-{folder.name}-{cifar.fingerprint(folder)[:16]}"
  assert (cache.cache_dir("") / entry).is_dir()
