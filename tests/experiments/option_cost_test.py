"""What is measured of options, and how it is compared."""

import pytest

from experiments.option_cost import __main__ as option_cost
from resnet_flax.configs import v1_depth20
from resnet_flax.run import rules


@pytest.mark.parametrize("name", option_cost.OPTIONS)
def test_options_are_of_the_network_that_is_measured(name):
  config = v1_depth20.get_config()
  config.update_from_flattened_dict(option_cost.OPTIONS[name])
  rules.check(config, num_devices=1)


def test_shares_are_of_the_same_round():
  speeds = {option_cost.NONE: [100.0, 50.0, 10.0], "x": [50.0, 50.0, 1.0]}
  lines = option_cost.table({"images_per_second": speeds}).splitlines()
  assert lines[2:] == ["| `x` | 0.50 | 0.10 to 1.00 |"]
