"""The table of exported weights is that of its raw file."""

import json
import pathlib

from experiments.weights import way_out

FOLDER = pathlib.Path(way_out.__file__).parent


def test_table_is_that_of_the_results():
  results = json.loads((FOLDER / "way_out.json").read_text())
  table = way_out.table({name: results[name] for name in way_out.NAMES})
  assert table in (FOLDER / "README.md").read_text()
  errors = [e for each in results.values() for e in each["errors"].values()]
  assert len(errors) == 2 * len(way_out.NAMES)
  assert max(errors) <= way_out.LIMIT
  assert all(each["same_bits_after_convert"] for each in results.values())
