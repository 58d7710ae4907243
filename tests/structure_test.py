"""The package stays readable: size, direction of imports, long functions."""

import re

from tests import structure


def test_imports_point_down():
  for name, imported in structure.imports().items():
    for other in imported:
      assert structure.layer_of(name) <= structure.layer_of(other), (
        f"{name} imports {other}, which lies above it"
      )


def test_imports_have_no_circles_and_few_floors():
  assert len(structure.longest_chain()) <= 7


def test_nothing_private_of_other_libraries_is_imported():
  for path in structure.modules().values():
    text = path.read_text()
    assert "jax._src" not in text, path
    assert not re.search(r"^(from|import) (configs|experiments)\b", text, re.M)


def test_few_entries_at_the_top():
  assert len(structure.entries()) <= 10


def test_the_reading_path_is_short_and_as_contributing_says():
  """`python -m tests.structure` writes it."""
  table = structure.reading_path()
  text = structure.PACKAGE.with_name("CONTRIBUTING.md").read_text()
  assert table in text
  assert int(table.rpartition("| together |")[2].strip(" |")) <= 3000


def test_functions_are_short_or_have_headings():
  for lines, name in structure.functions():
    assert lines <= 100, f"{name} has {lines} lines"
