"""Pictures of all kinds are predicted rightly, or named and skipped."""

import ast
import csv
import io
import itertools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

import resnet_flax
from experiments.streaming import generated
from resnet_flax.data import crops, dataset as dataset_lib, streaming
from resnet_flax.run import config as config_lib, errors, surroundings
from resnet_flax.tools import predict
from tests.data import pictures_kinds as kinds

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "use.md").read_text()
SECTION = PAGE.partition("## Say what pictures show")[2].partition("\n## ")[0]


class Seen:
  """Stands for a loaded network, and keeps what it is to predict."""

  def __init__(self, **dataset):
    self.config = config_lib.default_config()
    self.config.dataset.update(dataset)
    self.image_shape = dataset_lib.info(self.config.dataset).image_shape
    self.batches = []

  def predict(self, images):
    self.batches.append(images)
    return images.mean((1, 2))


def resized(pixels, size, box=None):
  image = Image.fromarray(pixels)
  return np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box))


def pixels_of(seen, path):
  ((_, found),) = predict.predict_files(seen, [str(path)], 1)
  np.testing.assert_array_equal(found, seen.batches[0][0].mean((0, 1)))
  return seen.batches[0][0]


@pytest.mark.parametrize("name", kinds.KINDS)
def test_every_kind_is_predicted(name, tmp_path):
  """Grey, palettes, CMYK, 16 bits, alpha, EXIF, animations."""
  kind = kinds.KINDS[name]
  (tmp_path / "picture").write_bytes(kind.encoded)
  found = pixels_of(Seen(), tmp_path / "picture")
  assert found.shape == (32, 32, 3)
  assert kinds.difference(found, resized(kind.pixels, (32, 32))) <= kind.loss


def huge(width):
  return kinds.encode(Image.new("1", (width, width)))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (kinds.encode(kinds.COLOUR)[:-30], "OSError: "),
    (kinds.encode(kinds.COLOUR, "JPEG")[:200], "OSError: Truncated File Read"),
    (huge(8193), "ValueError: it has 8193 x 8193 pixels"),
    (huge(14_000), "DecompressionBomb"),
    (b"a text\n\x1b[2J", "UnidentifiedImageError: "),
    (b"", "UnidentifiedImageError: "),
    (kinds.encode(kinds.COLOUR, "TIFF"), "UnidentifiedImageError: "),
    (None, "OSError: [Errno 22] not a regular file"),
  ],
)
def test_what_is_no_picture_is_said(content, message, tmp_path):
  path, good = tmp_path / "bad", tmp_path / "good"
  os.mkfifo(path) if content is None else path.write_bytes(content)
  good.write_bytes(kinds.encode(kinds.COLOUR))
  files = list(map(str, [good, path, good]))
  found = list(predict.predict_files(Seen(), files, 3))
  assert [name for name, _ in found] == files
  assert message in found[1][1]
  np.testing.assert_array_equal(found[0][1], found[2][1])


def test_streamed_sets_are_cut_as_they_were_in_training(tmp_path):
  counts = {"train": 4, "validation": 3}
  generated.prepare(tmp_path, counts, num_classes=2, width=60, height=45)
  settings = {"name": "imagenet2012", "data_dir": str(tmp_path)}
  seen = Seen(**settings, image_size=24)
  split = streaming.load(seen.config.dataset, "none")[0].test
  for position in range(3):
    (example,) = split.source.examples(np.array([position]))
    (tmp_path / "picture").write_bytes(example()[0])
    seen.batches.clear()
    images, _ = split.take(np.array([position]))
    found = pixels_of(seen, tmp_path / "picture")
    np.testing.assert_array_equal(found, images[0])


@pytest.mark.parametrize("shape", [(24, 24), (24, 25), (90, 30)])
def test_pictures_of_the_right_size_are_taken_as_they_are(shape, tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  path = tmp_path / "picture"
  path.write_bytes(kinds.encode(Image.fromarray(pixels)))
  found = pixels_of(Seen(name="imagenet2012", image_size=24), path)
  box = None if shape == (24, 24) else crops.scored(shape[::-1], 24)
  np.testing.assert_array_equal(found, resized(pixels, (24, 24), box))
  # Of sets in memory all is taken.
  whole = resized(pixels, (32, 32))
  np.testing.assert_array_equal(pixels_of(Seen(), path), whole)


def test_memory_and_programs_do_not_grow_with_the_folder(tmp_path):
  """Batches have one size, and no more than one is there at a time."""
  (tmp_path / "picture").write_bytes(kinds.encode(kinds.COLOUR))
  (tmp_path / "text").write_text("no picture")
  names = [str(tmp_path / name) for name in ("picture", "text", "picture")]
  seen = Seen()
  endless = predict.predict_files(seen, itertools.cycle(names), 4)
  taken = list(itertools.islice(endless, 11))
  assert [name for name, _ in taken] == [*names * 3, *names[:2]]
  assert [len(batch) for batch in seen.batches] == [4, 4, 4]
  assert len(list(predict.predict_files(seen, names * 3, 4))) == 9
  assert {batch.shape for batch in seen.batches} == {(4, 32, 32, 3)}
  # What `predict` would divide is not more than it takes.
  seen.config.eval_batch_size = 2
  list(predict.predict_files(seen, names, 4))
  assert len(seen.batches[-1]) == 2


def test_files_are_found_in_a_stable_order(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("b/2", "b/1", "a/c/0", "b.png", "a.png", "[1].png", ".hidden"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  os.symlink("nowhere", "b/3")
  os.symlink("..", "a/loop")
  below = ["a/c/0", "b/1", "b/2", "b/3"]
  files = [".hidden", "[1].png", "a.png", "b.png"]
  assert list(predict.find(".")) == [f"./{name}" for name in files + below]
  assert list(predict.find("[1].png")) == ["[1].png"]
  assert list(predict.find("*.png")) == files[1:]
  assert list(predict.find("[ab]")) == below
  assert list(predict.find("b/**")) == below[1:]
  for path in ("nothing", "*.jpg"):
    with pytest.raises(
      errors.DataError, match=f"PATH={re.escape(path)} must match"
    ):
      list(predict.find(path))


# ---- The command


NAMES = [
  "a,b.png",
  'a"b.png',
  "a\nb.png",
  "a\rb.png",
  "é 日本.png",
  "\\xff.png",
]
FORMULAS = ["=1+1.png", "@SUM.png", "+1.png", "-1.png", "\t=1.png", "\r=1.png"]


@pytest.fixture
def pictures(tmp_path, monkeypatch):
  """Names of pictures in the current folder, sorted, and their pixels."""
  monkeypatch.chdir(tmp_path)
  rng = np.random.default_rng(0)
  names = sorted([*NAMES, *FORMULAS, os.fsdecode(b"\xfe.png")])
  pixels = rng.integers(0, 256, (len(names), 32, 32, 3), np.uint8)
  (tmp_path / "pictures").mkdir()
  for name, each in zip(names, pixels, strict=True):
    encoded = kinds.encode(Image.fromarray(each))
    (tmp_path / "pictures" / name).write_bytes(encoded)
  return names, pixels


@pytest.fixture
def run(trained, monkeypatch, capsys):
  """A function of arguments that runs the command in this process."""
  monkeypatch.setattr(surroundings, "set_up", lambda: None)

  def run(*arguments):
    predict.main(["predict", str(trained), *arguments])
    return capsys.readouterr().out

  return run


def as_text(name):
  return name.replace("\udcfe", "\\xfe")


@pytest.mark.parametrize("batch_size", ["3", "32"])
def test_json_has_what_load_model_predicts(run, trained, pictures, batch_size):
  names, pixels = pictures
  out = run(
    "pictures", "--format=json", "--topk=10", f"--batch_size={batch_size}"
  )
  rows = json.loads(out)
  assert [row["path"] for row in rows] == [
    f"pictures/{as_text(name)}" for name in names
  ]
  loaded = resnet_flax.load_model(trained)
  expected = loaded.predict(pixels)
  for row, of_picture in zip(rows, expected, strict=True):
    labels = [each["class"] for each in row["classes"]]
    found = [each["probability"] for each in row["classes"]]
    assert sorted(labels) == list(loaded.class_names)
    assert found == sorted(found, reverse=True)
    order = [loaded.class_names.index(label) for label in labels]
    np.testing.assert_allclose(found, of_picture[order], rtol=1e-4)


def test_csv_is_well_formed_and_has_no_formulas(run, pictures, monkeypatch):
  names, _ = pictures
  monkeypatch.chdir("pictures")
  out = run("--format=csv", "--topk=2", "--", *names)
  titles, *rows = csv.reader(io.StringIO(out, newline=""), strict=True)
  assert titles == [
    *("path", "class_1", "probability_1", "class_2", "probability_2")
  ]
  assert [row[0] for row in rows] == [
    ("'" if name in FORMULAS else "") + as_text(name) for name in names
  ]
  for row in rows:
    assert len(row) == 5
    assert 1 >= float(row[2]) >= float(row[4]) >= 0


def test_a_table_has_a_line_for_each_picture(run, pictures):
  names, _ = pictures
  lines = run("pictures", "--topk=3").splitlines()
  assert len(lines) == len(names)
  for line in lines:
    assert re.fullmatch(r"(\d +\d+\.\d\d%  ){3}pictures/.*png", line)
    assert line.isprintable()


def test_bad_files_are_skipped_unless_strict(run, pictures, caplog):
  (pathlib.Path("pictures") / "a\x1b\nb").write_text("no picture")
  arguments = ["pictures", "--format=json"]
  assert len(json.loads(run(*arguments))) == len(pictures[0])
  (record,) = caplog.records
  assert record.message.startswith(r"skipped pictures/a\x1b\nb: Unidentified")
  with pytest.raises(
    errors.DataError,
    match=r"13 of 14 files can be decoded.* leave out --strict",
  ) as error:
    run(*arguments, "--strict")
  assert error.value.exit_code == 1
  with pytest.raises(errors.DataError, match=r"0 of 1 .* Pass pictures\.$"):
    run("pictures/a\x1b\nb")


def test_a_terminal_has_a_bar(run, pictures, monkeypatch):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr(sys, "stderr", terminal)
  rows = run("pictures").splitlines()
  assert "| 0/13 [" in terminal.getvalue()
  assert len(rows) == 13


def test_an_empty_folder(run, tmp_path):
  with pytest.raises(
    errors.DataError, match="only 0 of 0 files can be decoded"
  ):
    run(str(tmp_path))


@pytest.fixture
def run_with(run, monkeypatch):
  """As `run`, for a network of ten classes with these names."""
  from resnet_flax.run import load

  def run_with(class_names, *arguments):
    network = types.SimpleNamespace(
      config=config_lib.default_config(),
      class_names=class_names,
      image_shape=(32, 32, 3),
      model=types.SimpleNamespace(num_classes=10),
      predict=lambda images: np.tile(np.arange(10) / 45, (len(images), 1)),
    )
    monkeypatch.setattr(load, "load_model", lambda *_, **__: network)
    return run(*arguments)

  return run_with


def test_classes_without_names_have_numbers(run_with, pictures):
  """A head that `convert` took from a file, for example, has no names."""
  for line in run_with((), "pictures", "--topk=2").splitlines():
    assert line.startswith("9  20.00%  8  17.78%  pictures/")


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_bytes_of_a_class_that_are_not_text(run_with, pictures, form):
  """Classes may be folders; UTF-8 has no bytes for a surrogate."""
  names = tuple(os.fsdecode(b"caf\xe9 %d" % k) for k in range(10))
  out = run_with(names, "pictures", "--topk=1", f"--format={form}")
  escaped = r"caf\\xe9 9" if form == "json" else r"caf\xe9 9"
  assert escaped in out.encode().decode()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "arguments are required: PATH"),
    (["a", "--topk=0"], "--topk=0 and --batch_size=32 must be at least 1"),
    (["a", "--batch_size=-1"], "--topk=5 and --batch_size=-1 must be at least"),
    (["a", "--format=xml"], "invalid choice: 'xml'"),
    (["a", "--checkpoint=first"], "invalid choice: 'first'"),
    (["a", "--nonsense"], "unrecognized arguments: --nonsense"),
  ],
)
def test_mistakes(run, arguments, message):
  with pytest.raises(errors.ConfigError, match=message):
    run(*arguments)


def start(arguments, cwd):
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=cwd,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )


def test_the_python_of_the_pages(trained, tmp_path, monkeypatch, capsys):
  """The README's, then what use.md adds to it."""
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "quickstart").symlink_to(trained)
  monkeypatch.chdir(tmp_path)
  names = {}
  for page in ("README.md", "docs/use.md"):
    text = (ROOT / page).read_text()
    first, *_ = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    exec(first, names)
  assert len(ast.literal_eval(capsys.readouterr().out)) == 3
  assert names["logits"].shape == (3, 10)


@pytest.mark.slow
def test_the_commands_of_the_page(trained, pictures, tmp_path):
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "quickstart").symlink_to(trained)
  (tmp_path / "photo.png").write_bytes(kinds.encode(kinds.COLOUR))
  commands = re.findall("^python (-m .*)$", SECTION, re.MULTILINE)
  assert len(commands) == 3
  for command in commands:
    done = start(shlex.split(command), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) >= len(pictures[0])


@pytest.mark.slow
def test_skipped_files_are_one_line_each_and_no_bar(trained, tmp_path):
  (tmp_path / "huge").write_bytes(huge(10_000))
  (tmp_path / "text").write_text("no picture")
  (tmp_path / "picture").write_bytes(kinds.encode(kinds.COLOUR))
  command = ["-m", "resnet_flax.predict", str(trained), str(tmp_path)]
  done = start(command, tmp_path)
  assert done.returncode == 0
  assert len(done.stdout.splitlines()) == 1
  lines = done.stderr.splitlines()
  assert [line.partition(":")[0] for line in lines] == [
    f"skipped {tmp_path}/huge",
    f"skipped {tmp_path}/text",
  ]
  done = start([*command, "--strict"], tmp_path)
  assert done.returncode == 1
  assert done.stderr.splitlines() == [
    lines[0],
    done.stderr.splitlines()[1],  # It has an address.
    "error: only 1 of 3 files can be decoded. Pass pictures, or leave out"
    " --strict.",
  ]
  done = start([*command[:2], "nowhere", str(tmp_path / "none")], tmp_path)
  assert done.returncode == 1
  assert "/none must match a file or a folder." in done.stderr
  assert len(done.stderr.splitlines()) == 1
