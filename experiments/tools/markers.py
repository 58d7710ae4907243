"""Tables in Markdown files, between markers that say what makes them."""


def enclosing(name: str, command: str) -> tuple[str, str]:
  """What stands before and after a table.

  Args:
    name: of the table.
    command: what writes it.
  """
  return f"<!-- {name}: made by {command} -->", f"<!-- end of {name} -->"


def replace(text: str, name: str, command: str, table: str) -> str:
  """A file's text with another table between the markers.

  Args:
    text: of the file.
    name: of the table.
    command: what writes it.
    table: in Markdown.

  Raises:
    ValueError: the markers are not there.
  """
  start, end = enclosing(name, command)
  before, found, rest = text.partition(start)
  _, found_end, after = rest.partition(end)
  if not found or not found_end:
    raise ValueError(f"{start} ... {end} is missing")
  return f"{before}{start}\n\n{table}\n\n{end}{after}"
