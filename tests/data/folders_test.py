import errno
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from configs import base
from resnet_flax import data as datasets, train
from resnet_flax.data import dataset as dataset_lib, streaming
from resnet_flax.run import errors, files, load as inference, rules
from tests.helpers import Programs, at_event, untimed

CLASSES = ("blue", "green", "red")


def draw(path, label, rng, size=(40, 30)):
  """A picture of mostly one colour, in the format that its name states."""
  pixels = rng.integers(0, 120, (*size[::-1], 3), np.uint8)
  pixels[..., 2 - label] += 100
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path)


def make(root, parts=("train", "test"), count=12, names="{}.png", seed=0):
  """So many pictures of each class in each part."""
  rng = np.random.default_rng(seed)
  for part in parts:
    for label, name in enumerate(CLASSES):
      for k in range(count):
        draw(root / part / name / names.format(k), label, rng)
  return root


def make_config(root, **changes):
  config = base.get_config()
  config.batch_size = config.eval_batch_size = 6
  config.num_epochs = 2
  config.normalization = "imagenet"
  config.dataset.update({"name": "folder", "data_dir": str(root)})
  config.dataset.update({"image_size": 16, "num_workers": 0, **changes})
  config.model.update({"depth": 8, "num_filters": 4})
  config.model.batch_norm_momentum = 0.9
  config.log.tensorboard = False
  return config


def load(root, augmentation="none", **changes):
  return dataset_lib.load(make_config(root, **changes).dataset, augmentation)


def everything(split):
  return split.take(np.arange(len(split)))


def assert_equal(one, other):
  for ours, theirs in zip(everything(one), everything(other), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def refusal(root, **changes):
  with pytest.raises(errors.UserError) as caught:
    load(root, **changes)
  assert str(caught.value).isprintable()
  return str(caught.value)


# ---- Which pictures


def test_classes_are_folders_in_order(tmp_path):
  dataset = load(make(tmp_path))
  assert dataset.class_names == CLASSES
  assert dataset.validation is None
  images, labels = everything(dataset.train)
  assert (images.shape, images.dtype) == ((36, 16, 16, 3), np.uint8)
  assert (labels.dtype, list(np.bincount(labels))) == (np.int32, [12] * 3)
  np.testing.assert_array_equal(images.mean((1, 2)).argmax(-1), 2 - labels)


def test_pictures_of_the_wanted_size_are_taken_as_they_are(tmp_path):
  rng = np.random.default_rng(0)
  for label, name in enumerate(CLASSES):
    for k in range(2):
      draw(tmp_path / name / f"{k}.png", label, rng, (16, 16))
  images, _ = everything(load(tmp_path).train)
  expected = [Image.open(tmp_path / name / "1.png") for name in CLASSES]
  np.testing.assert_array_equal(images, np.stack([*map(np.asarray, expected)]))


@pytest.mark.parametrize(
  ("parts", "sizes"),
  [
    (("",), (30, None, 6)),  # Two of twelve.
    (("train",), (30, None, 6)),
    (("train", "val"), (36, None, 36)),
    (("train", "validation"), (36, None, 36)),
    (("train", "test"), (36, None, 36)),
    (("train", "val", "test"), (36, 36, 36)),
  ],
)
def test_what_is_scored(tmp_path, parts, sizes):
  config = make_config(make(tmp_path, parts)).dataset
  dataset = dataset_lib.load(config)
  found = dataset.train, dataset.validation, dataset.test
  assert tuple(each and len(each) for each in found) == sizes
  for split in filter(None, found):
    assert len(set(np.bincount(everything(split)[1]))) == 1  # Stratified.
  info = dataset_lib.info(config)
  assert (info.num_train, info.num_test) == (sizes[0], sizes[2])


def test_every_tenth_picture_by_name_is_scored(tmp_path):
  dataset = load(make(tmp_path, ("",)))
  names = sorted(f"{k}.png" for k in range(12))
  whole = load(make(tmp_path / "again", ("train", "test"))).train
  by_name = np.arange(36).reshape(3, 12)
  assert names[10] == "8.png"
  np.testing.assert_array_equal(
    everything(dataset.test)[0],
    whole.take(by_name[:, [0, 10]].ravel())[0],
  )
  np.testing.assert_array_equal(
    everything(dataset.train)[0],
    whole.take(np.delete(by_name, [0, 10], axis=1).ravel())[0],
  )


def test_every_extension_in_any_case_and_nothing_else(tmp_path, caplog):
  make(tmp_path, ("",), 2)
  rng = np.random.default_rng(0)
  names = ["a.JPG", "b.jpeg", "c.WebP", "d.bmp", "e.GIF"]
  for name in names:
    draw(tmp_path / "red" / name, 2, rng)
  draw(tmp_path / "red" / ".hidden.png", 2, rng)
  draw(tmp_path / ".cache" / "x.png", 2, rng)
  (tmp_path / "red" / "labels.txt").write_text("")
  draw(tmp_path / "red" / "deeper" / "x.png", 2, rng)
  (tmp_path / "red" / "gone.png").symlink_to("nowhere")
  caplog.set_level("INFO")
  dataset = load(tmp_path)
  assert len(dataset.train) + len(dataset.test) == 6 + len(names)
  (line,) = caplog.messages
  assert line.endswith("train 8, a tenth 3; 3 other entries are ignored")


def test_links_are_followed_and_circles_end(tmp_path):
  make(tmp_path / "there", ("",), 3)
  root = tmp_path / "here"
  (root / "red").mkdir(parents=True)
  (root / "blue").symlink_to(tmp_path / "there" / "blue")
  for k in range(2):
    target = tmp_path / "there" / "red" / f"{k}.png"
    (root / "red" / f"{k}.png").symlink_to(target)
  (root / "red" / "circle.png").symlink_to("circle.png")
  (root / "red" / "above").symlink_to(root)
  (root / "circle").symlink_to("circle")
  dataset = load(root)
  assert (len(dataset.train), len(dataset.test)) == (3, 2)


def test_a_class_called_train(tmp_path):
  make(tmp_path, ("",), 2)
  (tmp_path / "red").rename(tmp_path / "train")
  assert load(tmp_path).class_names == ("blue", "green", "train")


def test_parts_of_the_training_split_are_balanced(tmp_path):
  dataset = load(
    make(tmp_path, ("train", "val", "test")),
    validation_examples=9,
    train_examples=12,
  )
  for split, each in ((dataset.validation, 3), (dataset.train, 4)):
    assert list(np.bincount(everything(split)[1])) == [each] * 3
  assert not set(dataset.train.indices) & set(dataset.validation.indices)


def test_no_folder_is_left_out_without_a_word(tmp_path, caplog):
  parts = ("train", "val", "validation", "test")
  dataset = load(make(tmp_path / "two", parts))
  assert len(dataset.validation) == len(dataset.test) == 36
  assert f"in {tmp_path / 'two'} are not used: validation" in caplog.text
  # Its content is not looked at.
  (tmp_path / "two" / "validation" / "a new class").mkdir()
  assert load(tmp_path / "two").source == dataset.source
  other = make(tmp_path / "other", ("train", "valid", "Test"))
  (other / CLASSES[0]).mkdir()  # The name of a class.
  load(other)
  unused = f"Test, {CLASSES[0]}, valid"
  assert f"in {other} are not used: {unused}" in caplog.text
  caplog.clear()
  load(make(tmp_path / "used", ("train", "val", "test")))
  load(make(tmp_path / "classes", ("",)))
  assert "not used" not in caplog.text


# ---- What is refused


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda root: shutil.rmtree(root), "No such file or directory"),
    (
      lambda root: shutil.rmtree(root / "train"),
      "it must have two class folders, not ['test']",
    ),
    (
      lambda root: [shutil.rmtree(root / p) for p in ("train", "test")],
      "it must have two class folders, not [].*tfds/NAME",
    ),
    (
      lambda root: [
        shutil.rmtree(root / part / name)
        for part in ("train", "test")
        for name in ("blue", "green")
      ],
      "it must have two class folders, not ['red']",
    ),
    (
      lambda root: shutil.rmtree(root / "train" / "red"),
      "is in only one of train",
    ),
    (lambda root: shutil.rmtree(root / "test" / "red"), "class 'red'"),
    (lambda root: (root / "test" / "pink").mkdir(), "class 'pink'"),
    (
      lambda root: [p.unlink() for p in (root / "test" / "red").iterdir()],
      "class 'red' has no picture (.bmp",
    ),
  ],
)
def test_other_forms(tmp_path, change, message):
  root = make(tmp_path / "pictures", count=2)
  change(root)
  head, _, tail = message.partition(".*")
  text = refusal(root)
  assert head in text
  assert tail in text
  assert f"dataset.data_dir={root}" in text


def test_a_class_of_one_picture_needs_another(tmp_path):
  make(tmp_path, ("",), 1)
  assert "has no picture" in refusal(tmp_path)


def test_a_folder_must_be_named(monkeypatch, tmp_path):
  monkeypatch.setenv("TFDS_DATA_DIR", str(make(tmp_path)))
  with pytest.raises(errors.ConfigError, match="data_dir='' must name"):
    rules.check(make_config(""), 1)


def test_normalization_must_be_fixed(tmp_path):
  config = make_config(make(tmp_path))
  config.normalization = "pixel_mean"
  with pytest.raises(errors.ConfigError, match="caffe, imagenet, none"):
    rules.check(config, 1)


# ---- Bad pictures


@pytest.fixture
def damaged(tmp_path):
  """A folder of which three pictures cannot be decoded."""
  root = make(tmp_path, count=4)
  for name in ("train/green/2.png", "train/red/0.png", "test/red/1.png"):
    (root / name).write_bytes(b"no picture")
  return root


def test_bad_pictures_are_counted_and_named_before_training(damaged, caplog):
  text = refusal(damaged)
  assert "has 3 images that cannot be decoded" in text
  assert "train/green/2.png: UnidentifiedImageError" in text
  assert "bad_images=skip" in text
  named = [line for line in caplog.messages if line.startswith("bad image:")]
  assert len(named) == 3
  assert "test/red/1.png" in named[-1]


def test_bad_pictures_can_be_skipped(damaged):
  dataset = load(damaged, bad_images="skip")
  assert (len(dataset.train), len(dataset.test)) == (12, 11)
  images, labels = everything(dataset.train)
  # The next good one.
  np.testing.assert_array_equal(images[6], images[7])
  assert labels[8] == 2


def test_a_picture_that_cannot_be_read_is_a_bad_one(damaged, monkeypatch):
  """As on a disk with a bad sector."""
  unreadable, open_regular = damaged / "train/red/1.png", files.open_regular

  def fail(path):
    if path == unreadable:
      raise OSError(errno.EIO, "Input/output error")
    return open_regular(path)

  monkeypatch.setattr(files, "open_regular", fail)
  text = refusal(damaged)
  assert "has 4 images that cannot be decoded" in text
  assert len(load(damaged, bad_images="skip").train) == 12


def test_a_part_without_a_good_picture_ends(tmp_path):
  root = make(tmp_path)
  for path in root.glob("train/*/*"):
    path.write_bytes(b"no picture")
  match = r"no image of the split 'train' can be read\)\. Repair or remove such"
  with pytest.raises(errors.DataError, match=match):
    load(root, bad_images="skip")


def test_a_streamed_bad_picture_is_named_when_it_is_met(damaged):
  (damaged / "test" / "red" / "1.png").unlink()
  split = load(damaged, "random_resized_crop").train
  assert isinstance(split, streaming.StreamedSplit)
  with pytest.raises(errors.DataError, match=r"red/0\.png: Unidentified"):
    split.take(np.array([7, 8]))


@pytest.mark.slow
def test_a_run_that_a_bad_picture_ended_resumes_without_it(
  damaged, tmp_path, one_device, programs
):
  (damaged / "test" / "red" / "1.png").unlink()
  config = make_config(damaged)
  config.augment.name = "random_resized_crop"
  config.num_epochs = 1
  run = functools.partial(programs.train, devices=one_device)
  with pytest.raises(errors.DataError, match="bad_images=skip leaves out"):
    run(config, tmp_path / "run")
  config.dataset.bad_images = "skip"
  resumed = run(config, tmp_path / "run")
  assert untimed(resumed) == untimed(run(config, tmp_path / "again"))


# ---- In memory and streamed


def test_streamed_and_in_memory_are_the_same(tmp_path, monkeypatch):
  make(tmp_path, ("train", "val", "test"))
  memory = load(tmp_path)
  monkeypatch.setattr(streaming, "_IN_MEMORY_BYTES", 0)
  streamed = load(tmp_path)
  assert streamed.source == memory.source
  for name in ("train", "validation", "test"):
    ours, theirs = getattr(memory, name), getattr(streamed, name)
    assert isinstance(ours, datasets.ArraySplit)
    assert isinstance(theirs, streaming.StreamedSplit)
    assert_equal(ours, theirs)


def test_workers_cut_the_same_at_random(tmp_path):
  split = load(make(tmp_path), "random_resized_crop").train
  workers = load(tmp_path, "random_resized_crop", num_workers=1).train
  order, draw = [np.arange(20), np.arange(20, 36)], datasets.Draw(0, 1)
  for one, other in zip(
    split.batches(order, draw), workers.batches(order, draw), strict=True
  ):
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])


# ---- Which data it is


def test_every_change_is_another_set(tmp_path, monkeypatch):
  root = make(tmp_path, count=3)

  def source():
    return load(root).source

  sources = [source()]
  shutil.copytree(root, tmp_path / "copy")
  assert load(tmp_path / "copy").source == sources[0]
  shutil.rmtree(tmp_path / "copy")
  picture = root / "train" / "red" / "0.png"
  shutil.copy(picture, picture.with_name("x.png"))
  sources.append(source())
  picture.with_name("x.png").rename(root / "train" / "blue" / "x.png")
  sources.append(source())
  (root / "train" / "blue" / "x.png").unlink()
  assert source() == sources[0]
  content = bytearray(picture.read_bytes())
  content[-1] ^= 1  # Of what PNG has for a checksum.
  picture.write_bytes(content)
  sources.append(source())
  assert len(set(sources)) == 4
  # Of a large set contents are not read, but sizes are.
  monkeypatch.setattr(files, "READ_WHOLE", 0)
  large = source()
  content[-1] ^= 1
  picture.write_bytes(content)
  assert source() == large
  picture.write_bytes(content + b"x")
  assert source() != large


def test_only_what_has_changed_is_read_again(tmp_path, monkeypatch):
  config = make_config(make(tmp_path, count=2)).dataset
  assert dataset_lib.info(config).num_train == 6
  read = []
  scandir = os.scandir
  monkeypatch.setattr(
    os, "scandir", lambda path: (read.append(str(path)), scandir(path))[1]
  )
  assert dataset_lib.info(config).num_train == 6
  assert not read
  draw(tmp_path / "train" / "red" / "x.png", 2, np.random.default_rng(0))
  assert dataset_lib.info(config).num_train == 7
  assert read == [str(tmp_path / "train" / "red")]


# ---- Training


PAGE = pathlib.Path(__file__).parents[2] / "docs" / "use.md"
SECTION = PAGE.read_text().partition("## Your own pictures\n")[2]
COMMANDS = re.findall(
  r"^python -m (resnet_flax\.main .*)$", SECTION.partition("\n## ")[0], re.M
)
SMALL = (
  *("--config.batch_size=6", "--config.num_epochs=1"),
  *("--config.dataset.image_size=64", "--config.model.num_filters=4"),
  *("--config.log.tensorboard=False", "--workdir=run"),
)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_train(tmp_path, command):
  root = make(tmp_path / "DIR", ("",), 6)
  depth = f"--config.model.depth={18 if 'resnet50' in command else 8}"
  shutil.copytree(PAGE.parent.parent / "configs", tmp_path / "configs")
  done = subprocess.run(
    [sys.executable, "-m", *command.split(), *SMALL, depth],
    cwd=root.parent,
    env=os.environ | {"PYTHONPATH": str(PAGE.parent.parent)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "train 15, a tenth 3; 0 other entries are ignored" in done.stderr


def test_the_page_has_commands():
  assert len(COMMANDS) == 2


@pytest.fixture(scope="module")
def programs():
  return Programs()


def test_learns_and_is_used_where_the_folder_is_not(
  tmp_path, one_device, programs
):
  root = make(tmp_path / "pictures", count=24)
  config = make_config(root)
  config.num_epochs = 4
  config.augment.name = "none"
  workdir = tmp_path / "run"
  records = programs.train(config, workdir, devices=one_device)
  assert records[-1]["test_accuracy"] > 0.9
  images, labels = everything(load(root).test)
  shutil.rmtree(root)
  loaded = inference.load_model(workdir)
  assert loaded.class_names == CLASSES
  assert (loaded.predict(images).argmax(-1) == labels).mean() > 0.9
  with pytest.raises(errors.DataError, match="No such file"):
    inference.evaluate_workdir(workdir, devices=one_device)


# Several steps in a call need a training split in memory.
@pytest.mark.parametrize(
  ("crop", "steps"),
  [
    ("crop_flip", 2),
    pytest.param("random_resized_crop", 1, marks=pytest.mark.slow),
  ],
)
def test_a_run_goes_on_to_the_same_bits(
  tmp_path, one_device, crop, steps, programs
):
  config = make_config(make(tmp_path / "pictures"))
  config.augment.name, config.steps_per_call = crop, steps
  run = functools.partial(programs.train, devices=one_device)
  undisturbed = run(config, tmp_path / "undisturbed")
  config.checkpoint.every_steps = steps
  terminate = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
  stop = at_event("step", 8 // steps, terminate)
  with pytest.raises(errors.Interrupted, match="saved up to step 8"):
    run(config, tmp_path / "run", on_event=stop)
  assert untimed(run(config, tmp_path / "run")) == untimed(undisturbed)


def add_a_picture(root):
  draw(root / "train" / "red" / "x.png", 2, np.random.default_rng(1))


def add_a_class(root):
  for part in ("train", "test"):
    shutil.copytree(root / part / "red", root / part / "pink")


def change_a_picture(root):
  draw(root / "train" / "red" / "0.png", 2, np.random.default_rng(1))


@pytest.mark.parametrize(
  "change",
  [
    pytest.param(add_a_picture, marks=pytest.mark.slow),
    pytest.param(add_a_class, marks=pytest.mark.slow),
    change_a_picture,
  ],
)
def test_a_folder_that_was_changed_is_other_data(
  tmp_path, one_device, change, programs
):
  root = make(tmp_path / "pictures", count=4)
  config = make_config(root)
  config.num_epochs = 1
  workdir = tmp_path / "run"
  config.schedule.name = "constant"
  programs.train(config, workdir, devices=one_device)
  change(root)
  # Its own network can be used as before.
  assert inference.load_model(workdir).class_names == CLASSES
  with pytest.raises(errors.WorkdirError, match="other data"):
    inference.evaluate_workdir(workdir, devices=one_device)
  config.num_epochs = 2
  with pytest.raises(errors.WorkdirError, match="other data"):
    train.train_and_evaluate(config, workdir, devices=one_device)


def test_other_classes_of_another_folder_get_a_new_head(
  tmp_path, one_device, programs
):
  root = make(tmp_path / "pictures", count=4)
  config = make_config(root)
  config.num_epochs = 1
  workdir = tmp_path / "run"
  programs.train(config, workdir, devices=one_device)
  config.init_from = str(workdir)
  assert "head" in inference.load_source(config)["params"]
  for part in ("train", "test"):
    (root / part / "red").rename(root / part / "pink")
  assert "head" not in inference.load_source(config)["params"]


def test_pictures_that_are_added_while_a_run_starts(
  tmp_path, monkeypatch, one_device
):
  """The run's epochs would have other steps than its records say."""
  root = make(tmp_path / "pictures")
  load_set = dataset_lib.load

  def late(*arguments):
    make(root, parts=("train",), names="more{}.png")
    return load_set(*arguments)

  monkeypatch.setattr(train.dataset_lib, "load", late)
  with pytest.raises(
    errors.DataError, match="72 training images are found; the number"
  ):
    train.train_and_evaluate(
      make_config(root), tmp_path / "run", devices=one_device
    )
