"""The figures of a measurement are not lost at its end."""

import sys

import pytest

from experiments.option_cost import __main__ as option_cost
from experiments.streaming import __main__ as streaming
from experiments.throughput import __main__ as throughput
from experiments.weights import __main__ as weights
from resnet_flax.run import errors
from tests.helpers import run_module

MISSING = "--out=missing/results.json"
FAULT = "must be in a folder that exists and can be written"


@pytest.mark.parametrize(
  "name",
  [
    "seeds",
    pytest.param("devices", marks=pytest.mark.slow),
    pytest.param("throughput.start", marks=pytest.mark.slow),
    pytest.param("faults.checkpoint_cost", marks=pytest.mark.slow),
  ],
)
def test_a_folder_that_is_missing_ends_the_command_before_it_measures(name):
  config = "--config=configs/v1_depth20.py"
  ended = run_module(f"experiments.{name}", config, MISSING)
  assert ended.returncode == 2
  (line,) = ended.stderr.splitlines()
  assert line.startswith("error: ")
  assert f"out={MISSING[6:]}" in line
  assert FAULT in line


@pytest.mark.parametrize("module", [option_cost, weights])
def test_a_missing_folder_is_a_mistake_in_a_flag(module, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["", MISSING])
  with pytest.raises(SystemExit):
    module.main()
  assert FAULT in capsys.readouterr().err


def test_a_missing_folder_is_a_mistake_where_flags_are_parsed_apart(capsys):
  with pytest.raises(SystemExit):
    throughput.parse([MISSING])
  assert FAULT in capsys.readouterr().err
  with pytest.raises(errors.ConfigError, match=FAULT):
    streaming.main(["", "--folder=missing", MISSING])


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_there_is_at_least_one_round(value, monkeypatch, capsys, tmp_path):
  arguments = ["", f"--out={tmp_path}/a.json", f"--rounds={value}"]
  monkeypatch.setattr(sys, "argv", arguments)
  with pytest.raises(SystemExit):
    option_cost.main()
  assert f"--rounds: {value} must be an integer from 1" in (
    capsys.readouterr().err
  )
