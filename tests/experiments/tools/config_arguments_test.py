import pytest

from experiments.tools.config_arguments import config_arguments
from tests.helpers import parse_command_line

# Of ml_collections, as it loads a config file.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)


def test_every_form_of_an_argument_is_passed_on(tmp_path):
  file = tmp_path / "flags"
  file.write_text("--config.seed=3\n")
  found = []
  parse_command_line(
    *("main", "--config", "configs/v1_depth20.py", f"--flagfile={file}"),
    *("--config.model.depth", "8", "--config.model.scan", "--workdir=x"),
    *("--noconfig.augment.flip", "--config.schedule.drop_percents=(1,2,3,4)"),
    then=lambda: found.extend(config_arguments()),
  )
  assert found == [
    "--config=configs/v1_depth20.py",
    "--config.seed=3",
    "--config.model.depth=8",
    "--config.model.scan=True",
    "--config.augment.flip=False",
    "--config.schedule.drop_percents=(1, 2, 3, 4)",
  ]
  again = parse_command_line("main", *found, "--workdir=x")
  assert again[0].schedule.drop_percents == (1, 2, 3, 4)
