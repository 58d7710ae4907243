import dataclasses
import errno
import functools
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import given, settings, strategies as st
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from configs import imagenet_resnet50
from experiments.streaming import generated
from resnet_flax import data as datasets, train
from resnet_flax.data import (
  crops,
  dataset as dataset_lib,
  prepared,
  streaming,
  types,
)
from resnet_flax.parallel import evaluate, program
from resnet_flax.run import (
  errors,
  experiment as experiment_lib,
  files,
  load as inference,
  rules,
)
from tests.data import damage
from tests.helpers import ROOT, Programs, at_event, layout_of, untimed

COUNTS = {"train": 40, "validation": 10}
TRAIN_FILE = "imagenet2012-train.array_record-00000-of-00001"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """A TFDS directory with a tiny ImageNet; not to be changed."""
  folder = tmp_path_factory.mktemp("tfds")
  generated.prepare(folder, COUNTS, num_classes=4, width=60, height=45)
  return folder


@pytest.fixture
def copy(root, tmp_path):
  """The folder of a copy that may be changed."""
  shutil.copytree(root, tmp_path / "data é")
  return tmp_path / "data é" / "imagenet2012" / "5.1.0"


def make_config(root, num_workers=0):
  config = imagenet_resnet50.get_config()
  config.dataset.data_dir = str(root)
  config.dataset.image_size = 64
  config.dataset.num_workers = num_workers
  config.batch_size = config.eval_batch_size = 8
  config.num_epochs = 2
  config.model.update({"depth": 18, "num_filters": 4})
  config.log.tensorboard = False
  return config


def load(root, augmentation="random_resized_crop", **changes):
  config = make_config(root).dataset
  config.update(changes)
  return dataset_lib.load(config, augmentation)


def equal(ours, theirs):
  assert len(ours) == len(theirs)
  for (images, labels), (other_images, other_labels) in zip(
    ours, theirs, strict=True
  ):
    np.testing.assert_array_equal(images, other_images)
    np.testing.assert_array_equal(labels, other_labels)


def test_images_are_cut_as_pillow_cuts_them(root):
  dataset = load(root)
  assert (len(dataset.train), len(dataset.test)) == (40, 10)
  assert dataset.validation is None
  assert dataset.class_names == tuple(f"n0000000{k}" for k in range(4))
  assert dataset.source.startswith("imagenet2012-5.1.0-")
  path = root / "imagenet2012" / "5.1.0" / TRAIN_FILE
  reader = array_record_module.ArrayRecordReader(str(path))
  raw = [tf_example_pb2.Example.FromString(r) for r in reader.read_all()]
  feature = raw[17].features.feature
  encoded = feature["image"].bytes_list.value[0]
  with Image.open(io.BytesIO(encoded)) as image:
    assert image.size == (60, 45)
    expected = image.resize(
      (64, 64), Image.Resampling.BILINEAR, box=crops.scored((60, 45), 64)
    )
  images, labels = dataset.train.take(np.array([17, 3]))
  np.testing.assert_array_equal(images[0], np.asarray(expected))
  assert labels[0] == feature["label"].int64_list.value[0]
  assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
  assert images.shape == (2, *dataset.train.image_shape)


def test_images_of_the_wanted_size_are_taken_as_they_are(tmp_path):
  generated.prepare(tmp_path, COUNTS, num_classes=4, width=48, height=48)
  path = tmp_path / "imagenet2012" / "5.1.0" / TRAIN_FILE
  reader = array_record_module.ArrayRecordReader(str(path))
  raw = [tf_example_pb2.Example.FromString(r) for r in reader.read_all()]
  images, _ = load(tmp_path, image_size=48).train.take(np.arange(3))
  for image, example in zip(images, raw, strict=False):
    (encoded,) = example.features.feature["image"].bytes_list.value
    expected = np.asarray(Image.open(io.BytesIO(encoded)))
    np.testing.assert_array_equal(image, expected)


def test_without_grain(root, monkeypatch):
  monkeypatch.setitem(sys.modules, "grain", None)
  message = r"decoding while training needs grain, .*'resnet_flax\[streaming\]'"
  with pytest.raises(errors.ConfigError, match=message):
    load(root)


def test_a_set_without_names_has_numbers(copy):
  (copy / "label.labels.txt").unlink()
  assert load(copy.parent.parent).class_names == ("0", "1", "2", "3")


def test_images_depend_on_seed_epoch_and_position_alone(root):
  train_split = load(root).train
  order = list(np.random.default_rng(0).permutation(40).reshape(2, 20))
  draw = datasets.Draw(0, 1)
  whole = list(train_split.batches(order, draw))
  # What another of two processes asks for.
  parts = list(train_split.batches([rows[12:] for rows in order], draw))
  equal(parts, [(images[12:], labels[12:]) for images, labels in whole])
  # After a resume.
  equal(list(train_split.batches(order[1:], draw)), whole[1:])
  for other in (datasets.Draw(0, 2), datasets.Draw(1, 1), None):
    (images, labels), *_ = train_split.batches(order, other)
    np.testing.assert_array_equal(labels, whole[0][1])
    assert not (images == whole[0][0]).all(axis=(1, 2, 3)).any()


def test_epochs_are_permutations_that_any_step_can_be_taken_from(root):
  split = load(root).train
  layout = layout_of(make_config(root))

  def epoch(number, first=0):
    batches = program.epoch_batches(split, 8, number, layout, first=first)
    return [
      tuple(layout.get(networks)[0] for networks in batch) for batch in batches
    ]

  whole = epoch(3)
  assert len(whole) == 5
  equal(epoch(3, first=2), whole[2:])
  everything = split.take(np.arange(40))[1]
  labels = np.concatenate([labels for _, labels in whole])
  assert sorted(labels) == sorted(everything)
  assert (labels != np.concatenate([labels for _, labels in epoch(4)])).any()


def test_evaluation_takes_every_image_once(root):
  split = load(root).test
  images, labels, masks = zip(
    *evaluate.padded_batches(split, 4, np.arange(4)), strict=True
  )
  mask = np.concatenate(masks)
  assert mask.sum() == 10
  equal(
    [(np.concatenate(images)[mask], np.concatenate(labels)[mask])],
    [split.take(np.arange(10))],
  )


def test_of_a_batch_beyond_the_last_image_there_is_nothing(root):
  # What is left for the second of two hosts.
  for crops_of, shape in ((1, (64, 64, 3)), (10, (10, 64, 64, 3))):
    split = load(root, test_crops=crops_of).test
    (images, labels), _ = split.batches([np.arange(0), np.arange(2)])
    assert images.shape == (0, *shape)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    assert labels.shape == (0,)


def test_ten_crops_are_five_and_their_mirror_images(root):
  split = load(root, test_crops=10).test
  ((ten, labels),) = split.batches([np.arange(3)])
  assert ten.shape == (3, 10, 64, 64, 3)
  central, true = split.take(np.arange(3))
  np.testing.assert_array_equal(labels, true)
  np.testing.assert_array_equal(ten[:, 4], central)
  np.testing.assert_array_equal(ten[:, 5:], ten[:, :5, :, ::-1])
  for one, other in itertools.combinations(range(10), 2):
    assert (ten[:, one] != ten[:, other]).any()
  # While training an image is cut once.
  training = load(root, test_crops=10).train
  ((images, _),) = training.batches([np.arange(3)], datasets.Draw(0, 0))
  assert images.shape == (3, 64, 64, 3)


def test_two_crops_are_an_image_and_its_mirror_image(root, monkeypatch):
  def both():
    split = load(root, test_crops=2).test
    assert split.num_crops == 2
    return next(split.batches([np.arange(3)]))[0], split.take(np.arange(3))[0]

  decoded, central = both()
  np.testing.assert_array_equal(decoded[:, 0], central)
  np.testing.assert_array_equal(decoded[:, 1], central[:, :, ::-1])
  # A part of it is another split of its kind.
  part = load(root, test_crops=2).test.subset(np.array([2, 1]))
  np.testing.assert_array_equal(part.take(np.arange(2))[0], central[[2, 1]])
  # As of splits that are too large for the memory.
  monkeypatch.setattr(streaming, "_IN_MEMORY_BYTES", 0)
  streamed, _ = both()
  np.testing.assert_array_equal(streamed, decoded)


def test_parts_of_the_training_split(root):
  dataset = load(
    root, "random_resized_crop", validation_examples=8, train_examples=12
  )
  assert isinstance(dataset.validation, types.ArraySplit)  # Never cut anew.
  assert (len(dataset.validation), len(dataset.train)) == (8, 12)
  assert not set(dataset.validation.indices) & set(dataset.train.indices)
  fewer = load(root, validation_examples=8, train_examples=5).train
  assert set(fewer.indices) < set(dataset.train.indices)
  other = load(root, validation_examples=8, split_seed=1).validation
  assert set(other.indices) != set(dataset.validation.indices)
  positions = np.arange(12)
  equal(
    [dataset.train.take(positions)],
    [load(root).train.take(dataset.train.indices)],
  )


def test_any_prepared_set_can_be_named(root, tmp_path):
  (tmp_path / "flowers").mkdir()
  generated.prepare(
    tmp_path,
    {"train": 5, "test": 3},
    name="flowers",
    num_classes=2,
    width=20,
    height=30,
  )
  config = make_config(tmp_path)
  config.dataset.name = "tfds/flowers"
  config.batch_size = 4
  rules.check(config, 1)
  info = dataset_lib.info(config.dataset)
  names = "n00000000", "n00000001"
  assert info == types.DatasetInfo(2, (64, 64, 3), 5, 3, class_names=names)
  assert len(dataset_lib.load(config.dataset).test) == 3
  config.dataset.name = "tfds/trees"
  with pytest.raises(errors.DataError, match=r"trees\. Set .*data_dir.*Prep"):
    rules.check(config, 1)


def test_imagenet_without_a_copy_is_known_but_cannot_be_trained_on(tmp_path):
  config = imagenet_resnet50.get_config()
  config.dataset.data_dir = str(tmp_path)
  rules.check(config, 1)
  assert dataset_lib.info(config.dataset).num_classes == 1000
  assert dataset_lib.info(config.dataset).class_names == ()
  experiment = experiment_lib.build(config)
  assert experiment.learning_rate.steps_per_epoch == 1_281_167 // 256
  with pytest.raises(errors.DataError, match="no prepared imagenet2012 in"):
    dataset_lib.load(config.dataset)


@pytest.mark.parametrize(
  ("name", "key", "value", "message"),
  [
    ("imagenet2012", "normalization", "channel", "caffe, imagenet, none"),
    ("cifar10", "augment.name", "scale_crop", "It must be one of crop_flip"),
    ("tfds/../x", "seed", 0, "dataset.name='tfds/../x' is not known"),
    ("imagenet2012", "dataset.num_workers", -2, "from -1 to 256"),
    ("imagenet2012", "dataset.image_size", 0, "from 1 to 2048"),
    ("imagenet2012", "dataset.image_size", 16, "too small"),
  ],
)
def test_what_does_not_go_together(root, name, key, value, message):
  config = make_config(root)
  config.dataset.name = name
  config.update_from_flattened_dict({key: value})
  with pytest.raises(errors.ConfigError, match=message):
    rules.check(config, 1)


def refusal(copy, remedy="Prepare it|bad_images=skip|must have the features"):
  """The one line that a copy is refused with."""
  with pytest.raises(errors.DataError, match=remedy) as caught:
    read_all(copy)
  message = str(caught.value)
  assert message.isprintable()
  assert "imagenet2012/5.1.0" in message
  assert len(message) < 1000
  return message


def read_all(copy):
  """Opens and reads a copy."""
  dataset = load(copy.parent.parent)
  return [
    split.take(np.arange(len(split))) for split in (dataset.train, dataset.test)
  ]


def encode(mode="RGB", size=(60, 45), encoding="JPEG"):
  buffer = io.BytesIO()
  Image.new(mode, size).save(buffer, encoding)
  return buffer.getvalue()


def write_train_split(folder, image, label=3, count=40):
  """Replaces the training split: the last of its images is the given one."""
  path = folder / TRAIN_FILE
  path.unlink()
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for k in range(count):
    example = tf_example_pb2.Example()
    feature = example.features.feature
    last = k == count - 1
    feature["image"].bytes_list.value.append(image if last else encode())
    feature["label"].int64_list.value.append(label if last else 0)
    writer.write(example.SerializeToString())
  writer.close()


@pytest.mark.parametrize(
  "image",
  [
    encode("L"),
    encode("CMYK"),
    encode("RGBA", encoding="PNG"),
    encode("1", (1, 1), "PNG"),
  ],
)
def test_images_of_other_kinds_are_read(copy, image):
  write_train_split(copy, image)
  images, _ = read_all(copy)[0]
  assert images.shape == (40, 64, 64, 3)


# Its header announces 9,000 x 9,000 pixels.
BOMB = bytearray(encode(size=(1, 1), encoding="PNG"))
BOMB[16:24] = (9_000).to_bytes(4, "big") * 2


@pytest.mark.parametrize(
  ("image", "label", "message"),
  [
    (b"", 0, "cannot identify image"),
    (encode()[:-200], 0, "OSError"),
    (bytes(BOMB), 0, "Error"),
    (encode(encoding="EPS"), 0, "cannot identify image"),
    (
      *(encode()[:-200], 0),
      f"record 39, from 0, of the split 'train' (record 39 of {TRAIN_FILE}):"
      " OSError",
    ),
    (encode(), 4, "labels [4] must be one from 0 to 3"),
    (encode(), -1, "labels [-1]"),
  ],
)
def test_examples_that_are_none(copy, image, label, message):
  write_train_split(copy, image, label)
  found = refusal(copy, r"\)\. dataset\.bad_images=skip leaves out bad images")
  assert message in found
  assert "Prepare it" not in found  # Another copy has the same image.


def test_the_shard_of_a_bad_image_is_named(root):
  train_split = load(root).train
  (path,) = train_split.source.paths
  paths = [path.with_name(path.name.replace("train", "validation")), path]
  changes = {"paths": paths, "num_classes": 0}
  source = dataclasses.replace(train_split.source, **changes)
  split = dataclasses.replace(train_split, source=source)
  message = f"record 34, from.*record 24 of {TRAIN_FILE}"
  with pytest.raises(errors.DataError, match=message):
    split.take(np.array([34]))


@pytest.mark.parametrize("test_crops", [1, 2, 10])
def test_bad_images_are_skipped_exactly(copy, caplog, test_crops):
  write_train_split(copy, encode()[:-200])
  options = {"bad_images": "skip", "test_crops": test_crops}
  split = load(copy.parent.parent, **options).train
  order = list(np.roll(np.arange(40), 7).reshape(2, 20))
  draw = datasets.Draw(0, 1)
  whole = list(split.batches(order, draw))
  # Position 39 has what 0 has, the next good one of the split.
  np.testing.assert_array_equal(whole[0][0][6], whole[0][0][7])
  assert all((labels == 0).all() for _, labels in whole)
  list(split.batches(order))
  (line,) = caplog.messages
  assert line.startswith("bad image: record 39")
  assert line.endswith("1 so far")
  worker = dataclasses.replace(split, num_workers=1)
  equal(list(worker.batches(order, draw)), whole)
  # After a resume, by another process, and in a part without 0.
  equal(list(split.batches([order[0][5:]], draw)), [[x[5:] for x in whole[0]]])
  part = split.subset(np.array([39, 20]))
  images, _ = part.take(np.arange(2))
  np.testing.assert_array_equal(images[0], images[1])


def test_bad_images_are_not_scored(copy):
  write_train_split(copy, encode()[:-200])
  parts = {"train_examples": 20, "validation_examples": 20, "split_seed": 4}
  dataset = load(copy.parent.parent, bad_images="skip", **parts)
  held_out = dataset.validation.indices
  assert len(held_out) == 19  # Its twentieth is 39.
  assert 39 not in held_out
  for change in ({"test_crops": 10}, {}):
    other = load(copy.parent.parent, bad_images="skip", **parts | change)
    np.testing.assert_array_equal(other.validation.indices, held_out)


def test_a_set_of_bad_images_ends(copy):
  for path in copy.glob("*array_record*"):
    path.write_bytes((copy / TRAIN_FILE).read_bytes())
  write_train_split(copy, b"", count=1)
  info = json.loads((copy / "dataset_info.json").read_text())
  for split in info["splits"]:
    split["shardLengths"] = ["1" if split["name"] == "train" else "40"]
  (copy / "dataset_info.json").write_text(json.dumps(info))
  with pytest.raises(errors.DataError, match="no image of the split 'train'"):
    load(copy.parent.parent, bad_images="skip")


def test_small_splits_that_never_change_are_decoded_once(root, monkeypatch):
  memory = load(root, "shift_flip", validation_examples=8)
  drawn = load(root, "scale_crop").train
  assert isinstance(drawn, streaming.StreamedSplit)
  monkeypatch.setattr(streaming, "_IN_MEMORY_BYTES", 0)
  streamed = load(root, "shift_flip", validation_examples=8)
  for name in ("train", "validation", "test"):
    ours, theirs = getattr(memory, name), getattr(streamed, name)
    assert isinstance(ours, datasets.ArraySplit)
    assert isinstance(theirs, streaming.StreamedSplit)
    np.testing.assert_array_equal(ours.indices, theirs.indices)
    positions = np.array([5, 0, 3])
    equal([ours.take(positions)], [theirs.take(positions)])


def test_small_splits_are_not_worth_processes(root, monkeypatch):
  split = load(root, num_workers=-1).train
  order = [np.arange(8)]
  next(batches := split.batches(order))
  assert not multiprocessing.active_children()
  batches.close()
  monkeypatch.setattr(streaming, "_WORKERS_BYTES", 8 * 64 * 64 * 3)
  next(batches := split.batches(order))
  assert multiprocessing.active_children()
  batches.close()


def test_fewer_examples_than_announced(copy):
  write_train_split(copy, encode(), count=39)
  refusal(copy)


@pytest.mark.parametrize(
  "change",
  [
    {"splits": []},
    {"splits": [{"name": "train", "shardLengths": ["1"]}]},
    {"splits": [{"name": "test", "shardLengths": ["40"]}]},
    {"splits": [{"name": "train", "shardLengths": ["-1"]}]},
    {"splits": 3},
  ],
)
def test_dataset_info_that_says_something_else(copy, change):
  path = copy / "dataset_info.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  refusal(copy)


def test_features_besides_image_and_label_may_be_there(copy):
  path = copy / "features.json"
  features = json.loads(path.read_text())
  core = "tensorflow_datasets.core.features"
  number = {
    "pythonClassName": f"{core}.scalar.Scalar",
    "tensor": {"shape": {}, "dtype": "int64", "encoding": "none"},
  }
  box = {
    "pythonClassName": f"{core}.bounding_boxes.BBoxFeature",
    "boundingBox": {"shape": {"dimensions": ["4"]}, "dtype": "float32"},
  }
  features["featuresDict"]["features"] |= {
    "number": number,
    "boxes": {
      "pythonClassName": f"{core}.sequence_feature.Sequence",
      "sequence": {"feature": box, "length": "-1"},
    },
  }
  path.write_text(json.dumps(features))
  assert len(read_all(copy)[0][1]) == 40


def test_as_many_files_may_be_open_as_a_set_has(root, monkeypatch):
  """ImageNet has more than the 1024 that shells allow."""
  resource = pytest.importorskip("resource")
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, before[1]))
    load(root)
    after = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert after == (min(16 * (2 + 256), before[1]), before[1])
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
  monkeypatch.setattr(resource, "getrlimit", lambda which: (200, 200))
  with pytest.raises(errors.DataError, match=r"may open 200 here.*ulimit -Hn"):
    load(root)


def test_of_a_set_with_one_split_the_last_tenth_is_scored(copy):
  path = copy / "dataset_info.json"
  info = json.loads(path.read_text())
  whole = load(copy.parent.parent).train
  info["splits"] = [each for each in info["splits"] if each["name"] == "train"]
  path.write_text(json.dumps(info))
  dataset = load(copy.parent.parent)
  assert (len(dataset.train), len(dataset.test)) == (36, 4)
  equal([dataset.train.take(np.arange(36))], [whole.take(np.arange(36))])
  equal([dataset.test.take(np.arange(4))], [whole.take(np.arange(36, 40))])


def test_files_of_other_folders_are_not_read(copy):
  path = copy / "dataset_info.json"
  info = json.loads(path.read_text())
  for split in info["splits"]:
    split["filepathTemplate"] = "../{DATASET}-{SPLIT}.{FILEFORMAT}"
  intact = read_all(copy)
  path.write_text(json.dumps(info))
  equal(read_all(copy), intact)


def test_a_shard_that_is_missing_or_a_pipe(copy):
  (copy / TRAIN_FILE).unlink()
  assert "it has 0 images in 0 files of the split" in refusal(copy)
  os.mkfifo(copy / TRAIN_FILE)
  assert "not a regular file" in refusal(copy)


def test_a_copy_that_needs_tensorflow(copy):
  path = copy / "dataset_info.json"
  info = json.loads(path.read_text()) | {"fileFormat": "tfrecord"}
  path.write_text(json.dumps(info))
  assert "prepared as tfrecord" in refusal(copy)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(data=st.data(), edits=damage.edits(100_000), cut=damage.cuts(100_000))
def test_any_damage_is_one_line_or_harmless(root, data, edits, cut):
  intact = root / "imagenet2012" / "5.1.0"
  name = data.draw(st.sampled_from(sorted(p.name for p in intact.iterdir())))
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder) / "imagenet2012" / "5.1.0"
    shutil.copytree(intact, copy)
    damage.apply(copy / name, edits, cut)
    try:
      (images, labels), _ = read_all(copy)
    except errors.DataError:
      refusal(copy)
    else:
      assert images.shape[1:] == (64, 64, 3)
      assert len(labels) == len(images)


def test_records_in_another_order_are_another_set(copy):
  """ArrayRecord pads its files: their sizes are the same."""
  path = copy / TRAIN_FILE
  before, size = prepared.fingerprint(copy), path.stat().st_size
  records = array_record_module.ArrayRecordReader(str(path)).read_all()
  path.unlink()
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in reversed(records):
    writer.write(record)
  writer.close()
  assert path.stat().st_size == size
  assert prepared.fingerprint(copy) != before


def test_one_label_that_changed_makes_another_set(copy, monkeypatch):
  """The only change is in the middle of an uncompressed file."""
  path = copy / TRAIN_FILE
  options = "group_size:1,uncompressed"
  path.unlink()
  writer = array_record_module.ArrayRecordWriter(str(path), options)
  for k in range(40):
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["image"].bytes_list.value.append(bytes([k]) * 5_000)
    feature["label"].int64_list.value.append(1)
    writer.write(example.SerializeToString())
  writer.close()
  whole = path.read_bytes()
  before = prepared.fingerprint(copy)
  monkeypatch.setattr(files, "READ_WHOLE", 0)
  sampled = prepared.fingerprint(copy)
  label = whole.index(b"label", len(whole) // 4)
  path.write_bytes(whole[:label] + b"l4bel" + whole[label + 5 :])
  # What a digest of samples does not promise.
  assert prepared.fingerprint(copy) == sampled
  monkeypatch.undo()
  assert prepared.fingerprint(copy) != before


@pytest.mark.parametrize(
  ("name", "feature", "message"),
  [
    ("label", {"pythonClassName": "scalar.Scalar"}, "'label' has no 'class"),
    ("label", None, "its feature 'label' has no 'classLabel'"),
    ("label", {"classLabel": {}}, "its feature 'label' has no classes"),
    ("label", {"classLabel": {"numClasses": "-3"}}, "'label' has no classes"),
    ("image", None, "its feature 'image' has no 'image'"),
  ],
)
def test_a_set_without_classes_or_images(copy, name, feature, message):
  path = copy / "features.json"
  stated = json.loads(path.read_text())
  features = stated["featuresDict"]["features"]
  del features[name]
  if feature:
    features[name] = feature
  path.write_text(json.dumps(stated))
  (copy / "label.labels.txt").unlink()
  found = refusal(copy, "must have the features image and label")
  assert message in found
  assert "Prepare it" not in found


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_so(root, tmp_path):
  """The error must not blame the data or the memory, which are good."""
  script = tmp_path / "script.py"
  script.write_text(
    "import numpy as np\n"
    "from configs import imagenet_resnet50\n"
    "from resnet_flax.data import dataset\n"
    "config = imagenet_resnet50.get_config().dataset\n"
    f"config.data_dir, config.num_workers = {str(root)!r}, 1\n"
    "config.image_size = 32\n"
    "train = dataset.load(config).train\n"
    "next(train.batches([np.arange(8)]))\n"
  )
  done = subprocess.run(
    [sys.executable, str(script)],
    env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  assert "must train inside: if __name__ == '__main__'" in done.stderr
  assert "Prepare it again" not in done.stderr


def test_fingerprints_tell_copies_apart(copy, root):
  before = prepared.fingerprint(copy)
  assert before == prepared.fingerprint(root / "imagenet2012" / "5.1.0")
  with (copy / TRAIN_FILE).open("ab") as file:
    file.write(b"x")
  assert prepared.fingerprint(copy) != before


def test_a_network_is_used_where_its_data_is_not(copy, tmp_path, one_device):
  config = make_config(copy.parent.parent)
  config.dataset.name, config.dataset.image_size = "tfds/imagenet2012", 32
  config.model.update({"name": "resnet_v1", "depth": 8, "stride_in_3x3": True})
  config.num_epochs = 1
  workdir = tmp_path / "run"
  train.train_and_evaluate(config, workdir, devices=one_device)
  shutil.rmtree(copy.parent)
  loaded = inference.load_model(workdir)
  assert len(loaded.class_names) == 4
  images = np.zeros((2, 32, 32, 3), np.uint8)
  assert loaded.predict(images).shape == (2, 4)
  message = r"there is no prepared.*config\.json names .*pass --config=FILE"
  with pytest.raises(errors.DataError, match=message):
    inference.evaluate_workdir(workdir, devices=one_device)


def test_a_run_goes_on_to_the_same_bits(root, tmp_path, one_device):
  config = make_config(root)
  # Compiled sooner.
  config.dataset.image_size = 32
  config.model.update({"name": "resnet_v1", "depth": 8, "stride_in_3x3": True})
  run = functools.partial(Programs().train, devices=one_device)
  undisturbed = run(config, tmp_path / "undisturbed")
  config.checkpoint.every_steps = 1

  # Two steps into the second epoch.
  terminate = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
  with pytest.raises(errors.Interrupted, match="saved up to step 7"):
    run(
      *(config, tmp_path / "resumed"),
      on_event=at_event("step", 7, terminate),
    )
  resumed = run(config, tmp_path / "resumed")
  assert untimed(resumed) == untimed(undisturbed)
  # Scored by ten crops, whatever it was scored by while training.
  config.dataset.test_crops = 10
  ten = inference.evaluate_workdir(
    tmp_path / "resumed", "latest", config=config, devices=one_device
  )
  assert ten["step"] == resumed[-1]["step"]
  assert 0 < abs(ten["loss"] - resumed[-1]["test_loss"]) < 1
  with pytest.raises(errors.WorkdirError, match=r"test_crops \(1 there, 10"):
    train.train_and_evaluate(config, tmp_path / "resumed", devices=one_device)


PROGRAM = """
  if __name__ == "__main__":
    # Not in the workers, which start sooner without.
    import sys
    import numpy as np
    from resnet_flax import data as datasets
    from tests.data import streaming_test

    split = streaming_test.load(sys.argv[1], num_workers=int(sys.argv[2])).train
    order = list(np.random.default_rng(0).permutation(40).reshape(2, 20))
    endless = sys.argv[3] != "once"
    for images, labels in split.batches(
      order * (100_000 if endless else 1), datasets.Draw(0, 1)
    ):
      print(images.sum(), labels.sum(), flush=True)
      if sys.argv[3] == "paused":
        sys.stdin.readline()
"""


@pytest.fixture
def start(root, tmp_path):
  """Starts a program that prints of each batch what it sums to."""
  path = tmp_path / "program.py"
  path.write_text(textwrap.dedent(PROGRAM))

  def run(num_workers, *arguments):
    return subprocess.Popen(
      [sys.executable, "-W", "error", path, root, str(num_workers), *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

  return run


def children(pid):
  """The processes that a process has started."""
  path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
  tasks = path.parent.parent.glob("*/children")
  return [int(child) for task in tasks for child in task.read_text().split()]


def test_workers_make_the_same_batches(root, start):
  # More workers than chunks.
  with start(5, "once") as process:
    lines = process.stdout.read().splitlines()
  assert process.returncode == 0
  order = list(np.random.default_rng(0).permutation(40).reshape(2, 20))
  split = load(root).train
  assert lines == [
    f"{images.sum()} {labels.sum()}"
    for images, labels in split.batches(order, datasets.Draw(0, 1))
  ]


def test_without_shared_memory_the_copy_is_not_at_fault(root, monkeypatch):
  """Refused before compilation, and when shared memory fails only later."""
  split, order = load(root, num_workers=1).train, [np.arange(2)]

  def fail(*_):
    raise OSError(errno.EROFS, "Read-only file system")

  monkeypatch.setattr(multiprocessing, "Semaphore", fail)
  message = r"/dev/shm \(Read-only.*or set dataset\.num_workers=0"
  with pytest.raises(errors.DataError, match=message):
    load(root, num_workers=1)
  with pytest.raises(errors.DataError, match=message):
    next(split.batches(order))
  assert next(load(root, num_workers=0).train.batches(order))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_the_process_that_is_killed(start):
  with start(1, "endless") as process:
    process.stdout.readline()
    workers = children(process.pid)
    # Grain's worker and the standard library's resource tracker.
    assert workers
    # A signal to the whole job is the parent's to act on.
    for worker in workers:
      os.kill(worker, signal.SIGINT)
      os.kill(worker, signal.SIGTERM)
    for _ in range(5):
      assert process.stdout.readline()
    process.kill()
  deadline = time.monotonic() + 60
  while any(pathlib.Path(f"/proc/{worker}/exe").exists() for worker in workers):
    assert time.monotonic() < deadline
    time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_is_killed_is_not_the_copys_fault(start):
  with start(1, "paused") as process:
    process.stdout.readline()
    # Until it waits amid handing over.
    time.sleep(2)
    for child in children(process.pid):
      if b"spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
        os.kill(child, signal.SIGKILL)
    _, text = process.communicate("\n" * 100, timeout=60)
  assert process.returncode == 1
  last = text.splitlines()[-1]
  assert re.search(r"has ended \(exit code -9\).*smaller --config", last)
