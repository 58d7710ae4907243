"""Types of flags, for `argparse`."""

import argparse
import os
import pathlib
from collections.abc import Callable, Collection


def integers(text: str) -> list[int]:
  """Splits '20,56' at its commas; '' has no integers."""
  return [int(part) for part in text.split(",") if part]


def count(text: str) -> int:
  """An integer of at least 1."""
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f"{text} must be an integer from 1")
  return int(text)


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


CAN_BE_WRITTEN = "must be in a folder that exists and can be written"


def can_be_written(path: str) -> bool:
  """Whether a file's folder exists and can be written.

  Commands check this first: a long measurement's figures must not be lost.
  """
  return os.access(os.path.dirname(path) or ".", os.W_OK)


def output(text: str) -> pathlib.Path:
  """A file that can be written."""
  if not can_be_written(text):
    raise argparse.ArgumentTypeError(f"{text} {CAN_BE_WRITTEN}")
  return pathlib.Path(text)


def new_file(text: str) -> pathlib.Path:
  """An `output` that does not exist yet."""
  if os.path.exists(text):
    raise argparse.ArgumentTypeError(
      f"{text} exists already: remove it, or pass another"
    )
  return output(text)
