"""A table of repeated measurements."""

import statistics
from collections.abc import Iterable, Sequence


def spread_table(rows: Iterable[tuple[str, Sequence[float], str]]) -> str:
  """A Markdown table of the median, the least and the most of measurements.

  Args:
    rows: for each what was measured, with its unit, the values, and the format
      of a number.
  """
  lines = [
    "| measurement | median | least | most |",
    "| --- | --- | --- | --- |",
  ]
  for name, values, form in rows:
    numbers = (statistics.median(values), min(values), max(values))
    cells = " | ".join(format(number, form) for number in numbers)
    lines.append(f"| {name} | {cells} |")
  return "\n".join(lines)
