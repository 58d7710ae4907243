"""What is measured is written cell by cell, and drawn."""

import json
import pathlib
import re

import numpy as np
import pytest

from experiments.gradient_flow import measurement, plot
from experiments.tools import markdown, records
from resnet_flax.run import errors

LAYERS = ("stem_conv", "a/conv1", "a/gate_conv", "a/shortcut_conv", "head")


def make_cells(**changes):
  arguments = {
    "families": ["plain", "resnet_v2"],
    "depths": [20],
    "init_depths": [56],
    "batch_norm": [True, False],
    "num_seeds": 2,
    "batch_size": 8,
    "measure_at": [4, 0],
  }
  return measurement.cells(**(arguments | changes))


def fake(cell):
  """A record of a cell: norms of 2 and 8 for the two seeds, and a null."""
  measured = [
    [
      {
        "step": step,
        "loss": 2.3,
        "gradient": [value * 10.0**-step] * len(LAYERS),
        "activation": [value, None, 100.0, 100.0, value],
      }
      for step in cell.measure_at
    ]
    for value in (2.0, 8.0)
  ]
  return {
    "cell": cell.settings,
    "seconds": 1.0,
    "layers": LAYERS,
    "seeds": [
      {"seed": seed, "measured": of_seed}
      for seed, of_seed in enumerate(measured)
    ],
  }


def test_cells():
  cells = make_cells()
  assert len(cells) == 8
  assert [cell.depth for cell in cells] == [20] * 4 + [56] * 4
  assert {cell.measure_at for cell in cells[:4]} == {(0, 4)}
  assert {cell.measure_at for cell in cells[4:]} == {(0,)}
  config = cells[3].config()
  assert (config.model.name, config.model.norm) == ("resnet_v2", "none")
  assert not config.model.scan
  (deep,) = make_cells(
    families=["preact"], depths=[], init_depths=[326], batch_norm=[True]
  )
  assert deep.config().model.scan


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"depths": [21]}, "nearest: 20 and 26"),
    ({"families": ["plane"]}, "Did you mean 'plain'"),
    ({"batch_size": 0}, "batch_size=0"),
  ],
)
def test_what_cannot_be_measured_is_refused_at_once(changes, message):
  with pytest.raises(errors.ConfigError, match=message):
    make_cells(**changes)


def test_interrupted_measurement_goes_on(tmp_path):
  path = tmp_path / "results.jsonl"
  wanted = make_cells()
  assert measurement.read(path) == []
  records.write(path, [fake(cell) for cell in wanted[:3]])
  found = measurement.read(path)
  assert list(measurement.missing(wanted, found)) == wanted[3:]
  others = make_cells(batch_size=16)
  assert list(measurement.missing(others, found)) == others
  assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]


def test_networks_of_other_batches_are_not_shown_together():
  found = [fake(cell) for cell in make_cells()]
  plot.check(found)
  with pytest.raises(SystemExit, match="one batch size, not 2 pairs"):
    plot.check([*found, fake(make_cells(batch_size=16)[0])])


@pytest.mark.parametrize("text", ["{", "3\n", '{"cell": 1}\n'])
def test_other_files_are_refused(tmp_path, text):
  path = tmp_path / "results.jsonl"
  path.write_text(text)
  with pytest.raises(errors.DataError, match="cannot be read"):
    measurement.read(path)


@pytest.mark.slow
def test_measurement(tiny_config, one_device):
  tiny_config.model.name = "highway"
  tiny_config.model.norm = "none"
  measured = measurement.measure(tiny_config, [0, 1, 5], one_device)
  (of_seed,) = measured["seeds"]
  assert of_seed["seed"] == 0
  assert [each["step"] for each in of_seed["measured"]] == [0, 1, 5]
  first, *_, second = of_seed["measured"]
  for each in of_seed["measured"]:
    # Of one step, not of all in an epoch.
    assert 0 < each["loss"] < 1.5 * first["loss"]
    for quantity in measurement.QUANTITIES:
      assert len(each[quantity]) == len(measured["layers"]) == 11
      assert min(each[quantity]) > 0
  assert first["gradient"] != second["gradient"]
  assert json.loads(json.dumps(measured))["seeds"] == measured["seeds"]


def test_norms_of_the_layers_that_depth_counts():
  (cell, *_) = make_cells()
  norms = plot.norms(fake(cell), "activation", 4)
  np.testing.assert_array_equal(norms, [[2, np.nan, 2], [8, np.nan, 8]])


def test_the_spread_is_of_one_network():
  (cell, *_) = make_cells()
  record = fake(cell)
  record["seeds"][0]["measured"][0]["gradient"] = [1.0, 5.0, 9e9, 9e9, 0.5]
  record["seeds"][1]["measured"][0]["gradient"] = [1.0, 5.0, 1.0, 1.0, 0.0]
  # Gates and projections do not count; what is zero has no ratio.
  np.testing.assert_array_equal(plot.spread(record, 0), [10, np.nan])
  lines = plot.table([record]).splitlines()
  assert lines[2] == (
    "| with | `plain` | 20 | 0 | 10 (10 to 10); 1 not finite"
    " | 2.3 (2.3 to 2.3) |"
  )


def test_figures(tmp_path):
  path = tmp_path / "results.jsonl"
  records.write(path, [fake(cell) for cell in make_cells()])
  drawn = plot.figures(measurement.read(path))
  assert set(drawn) == {"signal", "gradients", "training"}
  figure = drawn["signal"]
  assert len(figure.axes) == 2 * 2
  lines = figure.axes[0].get_lines()
  assert [line.get_label() for line in lines] == ["plain", "resnet_v2"]
  assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 2
  # The geometric mean of two seeds; what is not finite leaves a gap.
  drawn_line = np.ma.filled(lines[0].get_ydata(), np.nan)
  np.testing.assert_allclose(drawn_line, [4, np.nan, 4])
  assert figure.axes[0].get_yscale() == "log"
  # Depth 56 was not trained.
  assert len(drawn["training"].axes) == 2
  over_time = drawn["training"].axes[0].get_lines()[0]
  np.testing.assert_array_equal(over_time.get_xdata(), [0, 4])
  np.testing.assert_allclose(over_time.get_ydata(), [1, 1])


def test_the_pages_have_the_numbers_of_the_raw_file():
  folder = pathlib.Path(plot.__file__).parent
  text = (folder / "README.md").read_text()
  table = plot.table(measurement.read(folder / "results.jsonl"))
  assert markdown.replace(text, "spread", plot.COMMAND, table) == text
  # Numbers with a range, in the manual and in what the page says of them.
  results = (folder.parents[1] / "docs" / "results.md").read_text()
  section = results.partition("## Gradients\n")[2].partition("\n## ")[0]
  summaries = re.findall(
    r"[\d.e]+ \([\d.e]+ to [\d.e]+\)", " ".join(section.split())
  )
  assert len(summaries) == 6
  assert all(f"| {each} |" in table for each in summaries)
  said = text.partition("**What it means.**")[2]
  numbers = re.findall(r"[\d.]+e\d+", said)
  assert len(numbers) > 5
  assert all(number in table for number in numbers)
