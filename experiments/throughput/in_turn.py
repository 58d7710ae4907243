"""The order of measurements that are compared with one another."""

from collections.abc import Iterable, Iterator


def in_turn(names: Iterable[str], rounds: int) -> Iterator[tuple[int, str]]:
  """Goes through the names once a round, in an order that alternates.

  So a drift of the machine favours none.

  Args:
    names: of what is measured.
    rounds: how often each is measured, after a round that warms up.

  Yields:
    (round, name). Round 0 warms up: its measurements do not count.
  """
  for round_number in range(rounds + 1):
    for name in sorted(names, reverse=bool(round_number % 2)):
      yield round_number, name
