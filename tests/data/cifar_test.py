import dataclasses
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import textwrap

import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import given, settings, strategies as st
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from configs import base
from resnet_flax.data import (
  cache,
  cifar,
  dataset as dataset_lib,
  prepared,
  types,
)
from resnet_flax.run import errors
from tests.data import archives, damage


@pytest.fixture
def config(tmp_path):
  config = base.get_config().dataset
  config.data_dir = str(tmp_path / "tfds")
  pathlib.Path(config.data_dir).mkdir()
  config.cache_dir = str(tmp_path / "cache")
  return config


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_from_archive_to_arrays(name, config, monkeypatch, tmp_path):
  path = tmp_path / "archive with spaces é.tar.gz"
  images, labels = archives.install(monkeypatch, name, path)
  config.name, config.archive = name, str(path)
  dataset = dataset_lib.load(config)
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
  again = dataset_lib.load(config)
  np.testing.assert_array_equal(again.train.images, dataset.train.images)


@pytest.mark.parametrize("name", ["a b é 日本", "we[i]rd {SPLIT} *%s:", "a\nb"])
def test_folders_of_any_name(config, monkeypatch, tmp_path, name):
  folder = tmp_path / name
  (folder / "tfds").mkdir(parents=True)
  archives.install(monkeypatch, "cifar10", folder / "archive.tar.gz")
  config.archive = str(folder / "archive.tar.gz")
  config.data_dir = str(folder / "tfds")
  config.cache_dir = str(folder / "cache")
  first = dataset_lib.load(config)
  monkeypatch.setattr(cifar, "prepare", None)
  np.testing.assert_array_equal(
    dataset_lib.load(config).test.labels, first.test.labels
  )


def test_another_process_that_prepares_the_same_is_faster(
  config, monkeypatch, tmp_path
):
  """Both processes have found no copy and begun."""
  archives.install(monkeypatch, "cifar10", tmp_path / "archive.tar.gz")
  config.archive = str(tmp_path / "archive.tar.gz")
  read = cifar.read_archive

  def slow(*arguments):
    monkeypatch.setattr(cifar, "read_archive", read)
    splits, class_names = read(*arguments)
    images, labels = splits["test"]

    def late():
      cifar.prepare("cifar10", pathlib.Path(config.data_dir), config.archive)
      yield from images

    return splits | {"test": (late(), labels)}, class_names

  monkeypatch.setattr(cifar, "read_archive", slow)
  assert len(dataset_lib.load(config).test)


def test_folder_whose_name_is_no_text(config, monkeypatch, tmp_path):
  archives.install(monkeypatch, "cifar10", tmp_path / "archive.tar.gz")
  config.archive = str(tmp_path / "archive.tar.gz")
  config.data_dir = str(tmp_path / os.fsdecode(b"\xff"))
  os.mkdir(config.data_dir)
  with pytest.raises(errors.DataError, match="cannot be prepared") as caught:
    dataset_lib.load(config)
  assert str(caught.value).isprintable()
  root = pathlib.Path(config.data_dir)
  assert prepared.find("cifar10", root) is None


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_from_download_to_arrays(name, config, monkeypatch, server):
  folder, url = server
  file = f"{name}-binary.tar.gz"
  _, labels = archives.install(
    monkeypatch, name, folder / file, f"{url}/{file}"
  )
  config.name = name
  dataset = dataset_lib.load(config)
  assert sorted(dataset.train.labels) == sorted(labels["train"])
  assert dataset.source.startswith(f"{name}-3.0.2-")


def test_prepared_copy_is_plain_tfds(config, monkeypatch, tmp_path):
  """The written copy is the stock data set: TFDS itself opens it by name."""
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
  dataset_lib.load(config)
  folder = prepared.find("cifar10", pathlib.Path(config.data_dir))
  before = prepared.fingerprint(folder)
  (folder / "label.labels.txt").write_text("\n".join("abcdefghij"))
  assert prepared.fingerprint(folder) != before
  assert dataset_lib.load(config).class_names[0] == "a"
  assert len(list(pathlib.Path(config.cache_dir).iterdir())) == 2


def test_damaged_copy_is_one_line(config, monkeypatch, tmp_path):
  path = tmp_path / "archive.tar.gz"
  archives.install(monkeypatch, "cifar10", path)
  config.archive = str(path)
  folder = cifar.prepare("cifar10", pathlib.Path(config.data_dir), str(path))
  for record_file in folder.glob("*array_record*"):
    record_file.write_bytes(b"")
  with pytest.raises(errors.DataError, match="Delete it"):
    dataset_lib.load(config)


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
  assert prepared.find("cifar10", tmp_path) == newest


@pytest.mark.parametrize("file_format", ["tfrecord", None])
def test_tfrecord_gets_a_clear_message(tmp_path, file_format):
  fake_version(tmp_path, "3.0.2", file_format)
  with pytest.raises(errors.DataError, match="as tfrecord, which needs Tensor"):
    prepared.find("cifar10", tmp_path)


def test_nothing_prepared(tmp_path):
  assert prepared.find("cifar10", tmp_path / "missing") is None


def test_data_dir(monkeypatch, tmp_path):
  (tmp_path / "from_environment").mkdir()
  (tmp_path / "configured").mkdir()
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "from_environment"))
  assert prepared.data_dir("").name == "from_environment"
  assert prepared.data_dir(str(tmp_path / "configured")).name == "configured"
  monkeypatch.delenv("TFDS_DATA_DIR")
  assert prepared.data_dir("") == pathlib.Path.home() / "tensorflow_datasets"


def test_unwritable_data_dir(config, monkeypatch, tmp_path):
  path = tmp_path / "archive.tar.gz"
  archives.install(monkeypatch, "cifar10", path)
  blocked = tmp_path / "a_file"
  blocked.write_text("")
  with pytest.raises(errors.DataError, match="cannot be prepared"):
    cifar.prepare("cifar10", blocked / "tfds", str(path))


def test_wrong_archive_is_not_prepared(config, monkeypatch, tmp_path):
  path = tmp_path / "archive.tar.gz"
  archives.install(monkeypatch, "cifar10", path)
  path.write_bytes(path.read_bytes() + b"x")
  config.archive = str(path)
  with pytest.raises(errors.DataError, match="is not the official archive"):
    dataset_lib.load(config)
  assert not list(pathlib.Path(config.data_dir).iterdir())
  assert not pathlib.Path(config.cache_dir).exists()


@pytest.mark.parametrize("path", ["~no_such_user/data", "x" * 300])
def test_paths_that_lead_nowhere(config, path):
  config.archive = path
  with pytest.raises(errors.DataError, match="cannot be read"):
    dataset_lib.load(config)


@pytest.mark.parametrize("name", ["x" * 300, "missing/tfds", "missing"])
@pytest.mark.parametrize("key", ["dataset.data_dir", "TFDS_DATA_DIR"])
def test_a_data_directory_that_was_named_is_not_made(
  config, monkeypatch, tmp_path, key, name
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("TFDS_DATA_DIR", name)
  config.data_dir = name if key == "dataset.data_dir" else ""
  before = list(tmp_path.iterdir())
  with pytest.raises(errors.DataError, match=f"^{key}=.* is not a directory"):
    dataset_lib.load(config)
  assert list(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
  ("name", "inside"),
  [
    ("cifar10", "cifar10"),
    ("cifar10", "cifar10/3.0.2"),
    ("food/small", "food"),
    ("food/small", "food/small"),
    ("food/small", "food/small/1.0.0"),
  ],
)
def test_a_data_directory_that_is_too_deep_is_answered_with_it(
  tmp_path, name, inside
):
  version = tmp_path / name / ("3.0.2" if name == "cifar10" else "1.0.0")
  version.mkdir(parents=True)
  (version / "dataset_info.json").write_text("{}")
  with pytest.raises(
    errors.DataError, match=rf"TFDS_DATA_DIR\) to {tmp_path}\."
  ):
    prepared.find(name, tmp_path / inside)
  # Another folder beside the copy may be filled with one.
  (tmp_path / "empty").mkdir()
  assert prepared.find(name, tmp_path / "empty") is None


NUM_TEST = archives.IMAGES_PER_FILE
KNOWN = types.DatasetInfo(10, (32, 32, 3), 5 * NUM_TEST, NUM_TEST)
TEST_FILE = "cifar10-test.array_record-00000-of-00001"


@pytest.fixture(scope="module")
def intact_copy(tmp_path_factory):
  """A small prepared CIFAR-10; not to be changed."""
  folder = tmp_path_factory.mktemp("intact")
  with pytest.MonkeyPatch.context() as patch:
    archives.install(patch, "cifar10", folder / "archive.tar.gz")
    return cifar.prepare("cifar10", folder, str(folder / "archive.tar.gz"))


@pytest.fixture
def copy(intact_copy, tmp_path):
  """A copy that may be changed."""
  folder = tmp_path / "data é\n" / "cifar10" / intact_copy.name
  shutil.copytree(intact_copy, folder)
  return folder


def read_copy(folder):
  """Opens and reads a copy, without a cache."""
  config = base.get_config().dataset
  config.data_dir = str(folder.parent.parent)
  with tempfile.TemporaryDirectory() as config.cache_dir:
    arrays, key = cifar.load(config, KNOWN)
    assert key.startswith(f"cifar10-{folder.name}-")
    return {name: np.array(each) for name, each in arrays.items()}


def check_intact(folder, intact):
  """Checks that a copy is read as if nothing had been changed."""
  found, expected = read_copy(folder), cifar.read(intact, KNOWN)
  np.testing.assert_array_equal(found["test_images"], expected["test_images"])
  np.testing.assert_array_equal(found["test_labels"], expected["test_labels"])


def refusal(folder):
  """The one line that a copy is refused with."""
  with pytest.raises(errors.DataError, match="Delete it") as caught:
    read_copy(folder)
  message = str(caught.value)
  assert "\n" not in message
  assert "cifar10/3.0.2" in message
  assert len(message) < 1000
  return message


def png(mode="RGB", size=(32, 32), encoding="PNG"):
  buffer = io.BytesIO()
  Image.new(mode, size).save(buffer, encoding)
  return buffer.getvalue()


def test_a_copy_with_another_number_of_classes(copy, tmp_path):
  config = base.get_config().dataset
  config.data_dir, config.cache_dir = str(copy.parent.parent), str(tmp_path)
  known = dataclasses.replace(KNOWN, num_classes=11)
  with pytest.raises(errors.DataError, match="it has 10 classes, not 11"):
    cifar.load(config, known)


def test_a_cache_that_lacks_an_array(copy, tmp_path):
  """Its digests fit, since somebody has forged it."""
  config = base.get_config().dataset
  config.data_dir, config.cache_dir = str(copy.parent.parent), str(tmp_path)
  _, key = cifar.load(config, KNOWN)
  entry = tmp_path / key
  (entry / "test_images.npy").unlink()
  (entry / "SHA256SUMS").write_text(cache._sums(entry))
  with pytest.raises(
    errors.DataError, match=r"must have the arrays .* Delete it"
  ):
    cifar.load(config, KNOWN)


def write_test_split(folder, image=None, label=3, count=NUM_TEST):
  """Replaces the test split by examples of what is given."""
  example = tf_example_pb2.Example()
  feature = example.features.feature
  feature["id"].bytes_list.value.append(b"test_00000")
  feature["image"].bytes_list.value.append(png() if image is None else image)
  if label is not None:
    labels = label if isinstance(label, list) else [label]
    feature["label"].int64_list.value.extend(labels)
  path = folder / TEST_FILE
  path.unlink()
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for _ in range(count):
    writer.write(example.SerializeToString())
  writer.close()


@pytest.mark.parametrize(
  "image", [png(), png(encoding="JPEG"), png("L"), png("P"), png("I;16")]
)
def test_other_images_are_read(copy, image):
  write_test_split(copy, image)
  arrays = cifar.read(copy, KNOWN)
  assert arrays["test_images"].shape == (4, 32, 32, 3)
  assert not arrays["test_images"].any()


# Its header announces 100,000 x 100,000 pixels.
BOMB = bytearray(png(size=(1, 1)))
BOMB[16:24] = (100_000).to_bytes(4, "big") * 2


@pytest.mark.parametrize(
  ("image", "message"),
  [
    (b"", "cannot identify image"),
    (b"no image", "cannot identify image"),
    (png()[:-30], "OSError"),
    # Each of these would be broadcast to the right shape.
    (png(size=(1, 1)), "shape (1, 1, 3)"),
    (png(size=(32, 1)), "shape (1, 32, 3)"),
    (png(size=(32, 33)), "shape (33, 32, 3)"),
    (png(size=(5000, 5000)), "shape (5000, 5000, 3)"),
    (bytes(BOMB), "Error"),
    # It would start Ghostscript.
    (png(encoding="EPS"), "cannot identify image"),
  ],
)
def test_images_that_are_none_or_of_another_kind(copy, image, message):
  write_test_split(copy, image)
  assert message in refusal(copy)


@pytest.mark.parametrize(
  ("label", "message"),
  [
    (10, "labels [10] must be one from 0 to 9"),
    (-1, "labels [-1]"),
    (2**32 + 3, "labels [4294967299]"),
    (None, "labels []"),
    ([1, 2], "labels [1, 2]"),
  ],
)
def test_labels_that_are_none_or_out_of_range(copy, label, message):
  write_test_split(copy, label=label)
  assert message in refusal(copy)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_fewer_examples_than_announced(copy, count):
  write_test_split(copy, count=count)
  refusal(copy)


@pytest.mark.parametrize("count", [3, 10**12, 2**63])
def test_another_number_of_examples_announced(copy, intact_copy, count):
  """The files' own numbers count."""
  path = copy / "dataset_info.json"
  info = json.loads(path.read_text())
  for split in info["splits"]:
    split["shardLengths"] = [str(count)]
  path.write_text(json.dumps(info))
  check_intact(copy, intact_copy)


@pytest.mark.parametrize(
  "template",
  ["/dev/zero", "../{DATASET}-{SPLIT}.{FILEFORMAT}", "x/{SPLIT}", "{SPLIT}"],
)
def test_files_of_other_folders_are_not_read(copy, intact_copy, template):
  path = copy / "dataset_info.json"
  info = json.loads(path.read_text())
  for split in info["splits"]:
    split["filepathTemplate"] = template
  path.write_text(json.dumps(info))
  check_intact(copy, intact_copy)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[]", "not a JSON object"),
    ("null", "not a JSON object"),
    ("", "JSONDecodeError"),
    ("{", "JSONDecodeError"),
    ("[" * 100_000, "nested too deeply"),
    ('{"a": "' + "x" * (1 << 26), "more than 67108864 bytes"),
  ],
)
def test_damaged_dataset_info(copy, text, message):
  (copy / "dataset_info.json").write_text(text)
  assert message in refusal(copy)


def test_a_damaged_version_beside_a_good_one(copy):
  other = copy.parent / "3.0.3"
  other.mkdir()
  (other / "dataset_info.json").write_text("{")
  assert prepared.find("cifar10", copy.parent.parent) == copy


FEATURES = "tensorflow_datasets.core.features"


@pytest.mark.parametrize(
  "features",
  [
    {"pythonClassName": "antigravity.Feature"},
    {"python_class_name": "antigravity.Feature", "text": {}},
    {"pythonClassName": f"{FEATURES}.text_feature.Text", "text": {}}
    | {"python_class_name": "antigravity.Feature"},
    {
      "pythonClassName": f"{FEATURES}.features_dict.FeaturesDict",
      "jsonFeature": {
        "json": json.dumps({"x": {"type": "antigravity.X", "content": {}}})
      },
    },
    {
      "pythonClassName": f"{FEATURES}.sequence_feature.Sequence",
      "sequence": {"feature": {"python_class_name": "antigravity.X"}},
    },
    {
      "pythonClassName": f"{FEATURES}.features_dict.FeaturesDict",
      "featuresDict": {
        "features": {"x": {"python_class_name": "antigravity.X"}}
      },
    },
    {"type": "antigravity.Feature", "content": {}},
    {"pythonClassName": ["tensorflow_datasets"]},
    {"pythonClassName": "tensorflow_datasets.testing.Feature"},
    {},
    [],
    None,
  ],
)
def test_features_name_no_other_code(copy, intact_copy, features):
  """TFDS would import it."""
  path = copy / "features.json"
  if isinstance(features, dict) and features:
    whole = json.loads(path.read_text())
    whole["featuresDict"]["features"]["extra"] = features
    features = whole
  path.write_text(json.dumps(features))
  check_intact(copy, intact_copy)
  assert "antigravity" not in sys.modules


@pytest.mark.parametrize("text", ["", "a\nb\n", "\0", None])
def test_names_that_do_not_match(copy, text):
  path = copy / "label.labels.txt"
  path.unlink()
  if text is not None:
    path.write_text(text)
  refusal(copy)


@pytest.mark.parametrize(
  ("name", "make"),
  [
    ("features.json", os.mkfifo),
    (TEST_FILE, os.mkfifo),
    (TEST_FILE, os.mkdir),
  ],
)
def test_files_that_are_none(copy, name, make):
  (copy / name).unlink()
  make(copy / name)
  refusal(copy)


def test_dataset_info_that_is_a_pipe(copy):
  (copy / "dataset_info.json").unlink()
  os.mkfifo(copy / "dataset_info.json")
  assert "not a regular file" in refusal(copy)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
  data=st.data(),
  edits=damage.edits(100_000),
  cut=damage.cuts(100_000),
)
def test_any_damage_is_one_line_or_harmless(intact_copy, data, edits, cut):
  names = sorted(path.name for path in intact_copy.iterdir())
  name = data.draw(st.sampled_from(names))
  with tempfile.TemporaryDirectory() as root:
    folder = pathlib.Path(root) / "cifar10" / intact_copy.name
    shutil.copytree(intact_copy, folder)
    damage.apply(folder / name, edits, cut)
    try:
      arrays = read_copy(folder)
    except errors.DataError:
      refusal(folder)
    else:
      assert arrays["train_images"].shape[1:] == (32, 32, 3)
      assert len(arrays["train_labels"]) == KNOWN.num_train


@pytest.mark.slow
def test_tensorflow_is_never_imported(tmp_path):
  """From the archive to a trained network, though one is installed."""
  program = """
    import dataclasses, pathlib, sys
    import pytest
    from configs import base
    from tests.data import archives

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
    (folder / "tfds").mkdir()
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
  folder = prepared.find("cifar10", pathlib.Path(cifar_data_dir))
  config = base.get_config().dataset
  config.data_dir = cifar_data_dir
  # The user's own cache: decoding takes 20 s.
  dataset = dataset_lib.load(config)
  assert len(dataset.train) == 50_000
  assert len(dataset.test) == 10_000
  assert (np.bincount(dataset.train.labels) == 5_000).all()
  assert (np.bincount(dataset.test.labels) == 1_000).all()
  assert dataset.class_names[-1] == "truck"
  mean = dataset.train.images[:1000].mean() / 255
  assert 0.45 < mean < 0.5
  entry = f"cifar10-{folder.name}-{prepared.fingerprint(folder)[:16]}"
  assert (cache.cache_dir("") / entry).is_dir()
