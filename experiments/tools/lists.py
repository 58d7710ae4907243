"""Flags that are lists, as types of `argparse`."""

import argparse
from collections.abc import Callable, Collection


def integers(text: str) -> list[int]:
  """Splits '20,56' at its commas; '' has no integers."""
  return [int(part) for part in text.split(",") if part]


def names(known: Collection[str]) -> Callable[[str], list[str]]:
  """Makes a type that splits 'a,b' at its commas; '' has no names."""

  def parse(text: str) -> list[str]:
    chosen = [part for part in text.split(",") if part]
    if unknown := set(chosen) - set(known):
      raise argparse.ArgumentTypeError(
        f"{', '.join(sorted(unknown))} must be among {', '.join(known)}"
      )
    return chosen

  return parse
