"""What is measured of options, and how it is compared."""

import json
import pathlib
import statistics

import pytest

from experiments.option_cost import __main__ as option_cost
from resnet_flax.configs import v1_depth20
from resnet_flax.run import rules

FOLDER = pathlib.Path(option_cost.__file__).parent


@pytest.mark.parametrize("name", option_cost.OPTIONS)
def test_options_are_of_the_network_that_is_measured(name):
  config = v1_depth20.get_config()
  config.update_from_flattened_dict(option_cost.OPTIONS[name])
  rules.check(config, num_devices=1)


def test_shares_are_of_the_same_round():
  speeds = {option_cost.NONE: [100.0, 50.0, 10.0], "x": [50.0, 50.0, 1.0]}
  lines = option_cost.table({"images_per_second": speeds}).splitlines()
  assert lines[2:] == ["| `x` | 0.50 | 0.10 to 1.00 |"]


def test_the_table_is_that_of_the_raw_file():
  results = json.loads((FOLDER / "results.json").read_text())
  assert results["images_per_second"].keys() == option_cost.OPTIONS.keys()
  assert option_cost.table(results) in (FOLDER / "README.md").read_text()
  speeds = results["images_per_second"][option_cost.NONE]
  median, ends = statistics.median(speeds), (min(speeds), max(speeds))
  shown = f"{median:.0f} ({ends[0]:.0f} to {ends[1]:.0f}) images/s"
  assert shown in (FOLDER / "README.md").read_text()
