"""Writes the tables of all networks' sizes into docs/networks.md.

  python -m experiments.networks

The command traces shapes and compiles nothing; deep networks take a minute.
"""

from experiments.tools import markdown
from experiments.tools.networks import table


def main() -> None:
  """Replaces the tables between their markers."""
  text = table.PAGE.read_text()
  for name, networks in table.TABLES.items():
    lines = []
    for network in networks:
      lines.append(table.row(network))
      print(lines[-1], flush=True)
    whole = "\n".join([table.HEADER, *lines])
    text = markdown.replace(text, name, table.COMMAND, whole)
  table.PAGE.write_text(text)


if __name__ == "__main__":
  main()
