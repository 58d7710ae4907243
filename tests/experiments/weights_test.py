"""The tables of converted and exported weights equal their raw files."""

import json
import pathlib

from experiments.weights import __main__ as way_in, way_out

FOLDER = pathlib.Path(way_out.__file__).parent


def test_table_of_converted_weights_is_that_of_the_results():
  results = json.loads((FOLDER / "results.json").read_text())
  assert [*results] == [*way_in.TORCH, *way_in.KERAS, *way_in.OLDER_KERAS]
  assert way_in.table(results) in (FOLDER / "README.md").read_text()
  files = [file for each in results.values() for file in each["files"].values()]
  measured = [file for file in files if isinstance(file, dict)]
  assert max(max(file["logits"], file["predict"]) for file in measured) <= 1e-5


def test_table_of_exported_weights_is_that_of_the_results():
  results = json.loads((FOLDER / "way_out.json").read_text())
  table = way_out.table({name: results[name] for name in way_out.NAMES})
  assert table in (FOLDER / "README.md").read_text()
  errors = [e for each in results.values() for e in each["errors"].values()]
  assert len(errors) == 2 * len(way_out.NAMES)
  assert max(errors) <= way_out.LIMIT
  assert all(each["same_bits_after_convert"] for each in results.values())
