"""Reads and writes a file of results; each command adds one record."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from resnet_flax.run import errors, files as files_lib

Record = dict[str, Any]


def arguments(argv: Sequence[str]) -> list[str]:
  """Selects the arguments of a command line that define the program.

  Args:
    argv: the command's name and its arguments.
  """
  return [each for each in argv[1:] if each.lstrip("-").startswith("config")]


def read(path: pathlib.Path) -> list[Record]:
  """Reads the results so far; an absent file has none.

  Args:
    path: path of the file.

  Raises:
    WorkdirError: it is not a file of results, or cannot be read.
  """
  try:
    results = [json.loads(line) for line in path.read_text().splitlines()]
    for each in results:
      each["topology"], each["arguments"]  # Other files lack these keys.
  except FileNotFoundError:
    if path.parent.is_dir():
      return []
    raise errors.WorkdirError(
      f"--out={path}: the folder {path.parent} must exist."
    ) from None
  except OSError as error:
    raise errors.WorkdirError(
      f"--out={path}: {errors.one_line(error)}."
    ) from error
  except (ValueError, KeyError, TypeError) as error:
    raise errors.WorkdirError(
      f"--out={path} must be a new file or a file of results."
    ) from error
  return results


def add(path: pathlib.Path, result: Record) -> None:
  """Adds a result, or replaces one of the same arguments and topology.

  Args:
    path: path of the file.
    result: the result, with its `arguments` and `topology`.

  Raises:
    WorkdirError: the file cannot be read or written.
  """

  def key(record: Record) -> tuple[str, list[str]]:
    return record["topology"], record["arguments"]

  results = read(path)
  known = [key(each) for each in results]
  if key(result) in known:
    results[known.index(key(result))] = result
  else:
    results.append(result)
  content = "".join(json.dumps(each) + "\n" for each in results)
  try:
    files_lib.write_file(path, content.encode())
  except OSError as error:
    raise errors.WorkdirError(
      f"--out={path}: {errors.one_line(error)}."
    ) from error
