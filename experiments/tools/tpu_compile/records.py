"""A file of results, to which each command adds its own."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from resnet_flax.run import errors, files as files_lib

Record = dict[str, Any]


def arguments(argv: Sequence[str]) -> list[str]:
  """Those of a command line that say what is compiled.

  Args:
    argv: the program's name and its arguments.
  """
  return [each for each in argv[1:] if each.lstrip("-").startswith("config")]


def read(path: pathlib.Path) -> list[Record]:
  """The results so far; none if there is no file.

  Args:
    path: of the file.

  Raises:
    WorkdirError: it is no such file, or cannot be read.
  """
  try:
    results = [json.loads(line) for line in path.read_text().splitlines()]
    for each in results:
      each["topology"], each["arguments"]  # Or it is another file.
  except FileNotFoundError:
    if path.parent.is_dir():
      return []
    raise errors.WorkdirError(
      f"--out={path}: there is no folder {path.parent}."
    ) from None
  except OSError as error:
    raise errors.WorkdirError(
      f"--out={path}: {errors.one_line(error)}."
    ) from error
  except (ValueError, KeyError, TypeError) as error:
    raise errors.WorkdirError(
      f"--out={path} is no file of results; name another one."
    ) from error
  return results


def add(path: pathlib.Path, result: Record) -> None:
  """Adds a result, in the place of an earlier one of the same.

  Args:
    path: of the file.
    result: with its `arguments` and `topology`.

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
