import csv
import io

from resnet_flax.tools.report import runs, tables

COLUMNS = [
  tables.Column("#", [1, 2, 3]),
  tables.Column("what", ["a|b", "<b>", "*"]),
  tables.Column(
    "accuracy (%)",
    [
      runs.Statistic(92.163, 0.118, 5),
      runs.Statistic(91.0, None, 1),
      runs.Statistic.of([]),
    ],
  ),
  tables.Column("speed", [1234.56, 70.13000000000001, None], 1),
]
TABLE = tables.Table("name", "A caption.", *COLUMNS)


def test_markdown():
  assert TABLE.to_markdown() == (
    "A caption.\n\n"
    "| # | what | accuracy (%) | speed |\n"
    "| ---: | --- | ---: | ---: |\n"
    r"| 1 | a\|b | 92.16 ± 0.12 | 1234.6 |"
    "\n"
    r"| 2 | \<b\> | 91.00 | 70.1 |"
    "\n"
    r"| 3 | \* | – | – |"
    "\n"
  )


def test_csv():
  rows = list(csv.DictReader(io.StringIO(TABLE.to_csv())))
  assert rows[0] == {
    "#": "1",
    "what": "a|b",
    "accuracy (%) mean": "92.163",
    "accuracy (%) std": "0.118",
    "accuracy (%) n": "5",
    "speed": "1234.56",
  }
  # No standard deviation of a single value, not one of zero.
  assert rows[1]["accuracy (%) std"] == ""
  assert rows[1]["speed"] == "70.13"
  assert rows[2]["accuracy (%) mean"] == rows[2]["speed"] == ""
  assert rows[2]["accuracy (%) n"] == "0"


def test_cells_may_hold_any_character():
  """A line break tears Markdown, and a spreadsheet runs what begins with =."""
  names = ["=1+1", "+1", "-1", "@x", "a\nb", "\x1b[31m", "\u202e"]
  table = tables.Table("name", "A caption.", tables.Column("run", names))
  rows = [row["run"] for row in csv.DictReader(io.StringIO(table.to_csv()))]
  assert rows[:4] == ["'=1+1", "+1", "-1", "'@x"]
  assert all(row.isprintable() for row in rows)
  assert len(table.to_markdown().splitlines()) == 4 + len(names)
  titles = tables.Table(
    "name", "A caption.", *(tables.Column(each, [1]) for each in names)
  )
  assert len(titles.to_markdown().splitlines()) == 5


def test_large_counts_are_legible():
  assert COLUMNS[0].show(10_000) == "10,000"


def test_a_small_number_is_not_zero():
  column = tables.Column("x", [], 2)
  assert column.show(0.004) == "0.004"
  assert column.show(-0.0) == column.show(-1e-17) == "0.00"
  assert tables.Column("p", [], 4, 0.0).show(3e-12) == "3e-12"


def test_numbers_are_numbers_in_files():
  table = tables.Table("name", "A.", tables.Column("value", ["-2.0", "-.5E+3"]))
  assert table.to_csv().splitlines()[1:] == ["-2.0", "-.5E+3"]


def test_markdown_of_any_class():
  table = tables.Table("name", "A.", tables.Column("class", ["__init__&$~"]))
  assert r"\_\_init\_\_\&\$\~" in table.to_markdown()
