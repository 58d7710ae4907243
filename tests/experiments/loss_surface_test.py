"""The plane of a trained network's weights, and what is measured on it."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from experiments.loss_surface import __main__ as command, plot, surface
from experiments.tools import markdown, records
from resnet_flax import step as step_lib, train
from resnet_flax.run import errors, load

FOLDER = pathlib.Path(plot.__file__).parent
PLANE = {"points": 3, "extent": 0.5, "examples": 32, "seed": 1}


@pytest.fixture(scope="module")
def workdir(make_tiny_config, tmp_path_factory):
  folder = tmp_path_factory.mktemp("loss_surface")
  config = make_tiny_config(folder / "cache")
  config.model.name = "plain"
  config.num_epochs = 1
  # Two batches of the plane's images, the second smaller.
  config.eval_batch_size = 20
  train.train_and_evaluate(config, folder / "run", devices=jax.devices()[:1])
  return folder / "run"


@pytest.fixture(autouse=True)
def the_tests_own_surroundings(monkeypatch):
  monkeypatch.setattr(command.surroundings, "set_up", lambda: None)


@pytest.fixture(scope="module")
def opened(workdir):
  return surface.open_run(workdir, PLANE)


def run(workdir, out, *arguments):
  flags = [f"--{name}={value}" for name, value in PLANE.items()]
  command.main(["", str(workdir), f"--out={out}", *flags, *arguments])
  return records.read(out / "results.jsonl")


def test_directions_have_the_norms_of_the_filters(workdir):
  params = jax.device_get(load.load_model(workdir, "latest").variables)[
    "params"
  ]
  drawn = surface.directions(params, 0)
  for direction in drawn:
    pairs = zip(
      jax.tree.leaves(params), jax.tree.leaves(direction), strict=True
    )
    for weights, moved in pairs:
      assert weights.shape == moved.shape
      if weights.ndim == 1:  # A bias, or batch norm's.
        assert not moved.any()
        continue
      wanted, found = (
        np.linalg.norm(each.reshape(-1, each.shape[-1]), axis=0)
        for each in (weights, moved)
      )
      np.testing.assert_allclose(found, wanted, rtol=1e-5)
  first, second = (np.asarray(each["head"]["kernel"]) for each in drawn)
  assert abs(np.sum(first * second)) < 0.5 * np.sum(first**2)
  again = surface.directions(params, 0)
  jax.tree.map(np.testing.assert_array_equal, drawn, again)


def test_the_centre_is_the_loss_of_the_run(workdir, opened):
  scores = load.evaluate_workdir(workdir, "latest", split="train")
  loss, error = opened[1](0.0, 0.0)
  assert loss == pytest.approx(scores["loss"], rel=1e-5)
  assert error == pytest.approx(1 - scores["accuracy"])


def test_a_point_has_other_weights_and_the_same_statistics(workdir, opened):
  loaded = load.load_model(workdir, "latest")
  variables = jax.device_get(loaded.variables)
  first, second = surface.directions(variables["params"], PLANE["seed"])
  variables["params"] = jax.tree.map(
    lambda w, a, b: w + np.float32(0.1) * a - np.float32(0.2) * b,
    *(variables["params"], first, second),
  )
  split = surface.data.load(loaded.config.dataset).train
  images, labels = split.take(np.arange(32))
  logits = jax.jit(loaded.model.apply, static_argnames="train")(
    variables, np.asarray(loaded.preprocess(images)), train=False
  )
  expected = np.mean(step_lib.cross_entropy(logits, labels))
  loss, _ = opened[1](0.1, -0.2)
  assert loss == pytest.approx(float(expected), rel=1e-4)


def test_an_interrupted_grid_keeps_its_rows(workdir, tmp_path):
  readme = tmp_path / "README.md"
  readme.write_text("\n".join(markdown.enclosing("surface", command.COMMAND)))
  (whole,) = run(workdir, tmp_path)
  assert np.shape(whole["loss"]) == np.shape(whole["error"]) == (3, 3)
  assert whole["epochs"] == 1
  assert "| plain, 8 layers, 1 epochs |" in readme.read_text()
  assert (tmp_path / "surface.png").stat().st_size > 1000
  # The first row is there, and is not the network's.
  kept = whole | {"loss": [[9.0] * 3], "error": whole["error"][:1]}
  (tmp_path / "results.jsonl").write_text(json.dumps(kept) + "\n")
  (resumed,) = run(workdir, tmp_path)
  assert resumed["loss"] == [[9.0] * 3, *whole["loss"][1:]]
  assert resumed["error"] == whole["error"]
  # Nothing is missing; what is there is drawn again.
  command.main(["", f"--out={tmp_path}"])
  assert records.read(tmp_path / "results.jsonl") == [resumed]
  with pytest.raises(errors.ConfigError, match=r"seed \(1 there, 2 here\)"):
    run(workdir, tmp_path, "--seed=2")


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--points=4", "--points=4"),
    ("--extent=0", "must be positive"),
    ("--examples=33", "--examples=33 must be at most 32"),
  ],
)
def test_what_cannot_be_evaluated_is_refused(
  workdir, tmp_path, argument, message
):
  with pytest.raises(errors.ConfigError, match=message):
    run(workdir, tmp_path, argument)
  assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
  (tmp_path / "results.jsonl").write_text('{"of": ')
  with pytest.raises(errors.DataError, match=r"results\.jsonl cannot be read"):
    command.main(["", f"--out={tmp_path}"])


def test_bfloat16_is_refused(workdir, tmp_path):
  other = shutil.copytree(workdir, tmp_path / "run")
  config = json.loads((other / "config.json").read_text())
  config["model"]["dtype"] = "bfloat16"
  (other / "config.json").write_text(json.dumps(config))
  with pytest.raises(errors.ConfigError, match=r"model\.dtype=bfloat16"):
    surface.open_run(other, PLANE)


X, Y = np.meshgrid(np.arange(-4, 5), np.arange(-4, 5), indexing="ij")


@pytest.mark.parametrize(
  ("loss", "not_convex", "inner"),
  [
    (1 + X**2 + Y**2, 0, 49),
    (100 + X**2 - Y**2, 100, 49),
    # A negative curvature along the diagonal only.
    (100 + X * Y, 100, 49),
    # Of less than a tenth of the other one, then of more.
    (100 + X**2 - 0.09 * Y**2, 0, 49),
    (100 + X**2 - 0.11 * Y**2, 100, 49),
    # Rounding alone.
    (100 + 1e-4 * np.random.default_rng(0).random((9, 9)), 0, 49),
    # One point is not finite: nine have it as a neighbour.
    (np.where((X == 2) & (Y == 2), np.nan, 1 + X**2 + Y**2), 0, 40),
  ],
)
def test_convexity(loss, not_convex, inner):
  shape = plot.measure(loss)
  assert shape.not_convex == pytest.approx(not_convex)
  assert shape.inner == inner


def test_low_points():
  # At most 0.5 above: the centre and its four neighbours.
  assert plot.measure(1 + 0.5 * (X**2 + Y**2)).low == 5
  assert plot.measure(np.where(X == 0, 1.0, np.nan)).low == 9


def make_record(name, loss):
  return {
    "of": {
      "config": {"model": {"name": name, "depth": 56}},
      "plane": {"points": 9, "extent": 0.5, "examples": 1000, "seed": 0},
    },
    "epochs": 32.0,
    "environments": [{"cpu_threads": 2, "cpu_model": "X", "git_commit": None}],
    "seconds": 60.0,
    "loss": np.where(np.isnan(loss), None, loss).tolist(),
    "error": np.zeros((9, 9)).tolist(),
  }


BOWL, SADDLE = 1 + 0.5 * (X**2 + Y**2), 20 + X**2 - Y**2


@pytest.mark.parametrize(
  ("plain", "residual", "expected"),
  [
    (BOWL, BOWL, "no other by"),
    (1 + 1.0 * (X**2 + Y**2), BOWL, "wider by"),
    (BOWL, 1 + 1.0 * (X**2 + Y**2), "narrower by"),
    (SADDLE, BOWL, "narrower and more convex by"),
    (BOWL, SADDLE, "wider and less convex by"),
  ],
)
def test_verdict(plain, residual, expected):
  both = [make_record("plain", plain), make_record("resnet_v1", residual)]
  assert expected in plot.verdict(both)
  assert plot.verdict(both[::-1]) == plot.verdict(both)
  assert "are for one plain" in plot.verdict(both[:1])


def test_figure():
  lost = np.where((X == 4) & (Y == -4), np.nan, BOWL)
  both = [make_record("plain", lost), make_record("resnet_v1", 100 * BOWL)]
  figure = plot.draw(both)
  one, other, bar = figure.axes
  assert "plain, 56 layers, 32 epochs\nloss at the centre: 1" in one.get_title()
  assert "loss at the centre: 100" in other.get_title()
  assert "1,000 training images, CIFAR-10 (JPEG copy)" in figure.get_suptitle()
  assert one.get_xlabel()
  assert one.get_ylabel()
  assert bar.get_ylabel() == "mean cross-entropy"
  for panel in (one, other):
    # Filled contours, the dashed line.
    assert len(panel.collections) == 2
  lines = plot.table(both).splitlines()
  assert lines[2] == (
    "| plain, 56 layers, 32 epochs | 1 | 0.0 | 1, (0, 0) | 5 of 81"
    " | 0.0 of 48 | 1.0 |"
  )


def test_the_page_has_the_numbers_of_the_raw_file():
  text = (FOLDER / "README.md").read_text()
  table = plot.table(records.read(FOLDER / "results.jsonl"))
  assert markdown.replace(text, "surface", command.COMMAND, table) == text
