"""Replaces tables in Markdown files, between markers that name a command."""

import pathlib


def enclosing(name: str, command: str) -> tuple[str, str]:
  """Makes the markers before and after a table.

  Args:
    name: name of the table.
    command: the command that writes it.
  """
  return f"<!-- {name}: made by {command} -->", f"<!-- end of {name} -->"


def replace(text: str, name: str, command: str, table: str) -> str:
  """Returns a file's text with another table between the markers.

  Args:
    text: text of the file.
    name: name of the table.
    command: the command that writes it.
    table: the new table, in Markdown.

  Raises:
    ValueError: the markers are missing.
  """
  start, end = enclosing(name, command)
  before, found, rest = text.partition(start)
  _, found_end, after = rest.partition(end)
  if not found or not found_end:
    raise ValueError(f"{start} ... {end} is missing")
  return f"{before}{start}\n\n{table}\n\n{end}{after}"


def update(path: pathlib.Path, name: str, command: str, table: str) -> None:
  """Replaces one table of a file; see `replace`."""
  path.write_text(replace(path.read_text(), name, command, table))
