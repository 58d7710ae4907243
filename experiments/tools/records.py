"""Files of raw figures with a JSON object, a record, on each line."""

import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

from resnet_flax.run import errors, files as files_lib

Record = dict[str, Any]


def read(path: pathlib.Path, *keys: str) -> list[Record]:
  """The records of a file; none if it does not exist.

  Raises `DataError` if it cannot be read or a record lacks one of `keys`.
  """
  try:
    lines = files_lib.read_bytes(path).splitlines()
    records = [files_lib.parse_object(line) for line in lines]
    if not all(record.keys() >= set(keys) for record in records):
      raise ValueError(f"a record lacks one of {', '.join(keys)}")
  except FileNotFoundError:
    return []
  except (OSError, ValueError) as error:
    raise errors.DataError(
      f"{path} cannot be read: {error}. Restore or remove it, or pass another"
      " --out."
    ) from error
  return records


def rounded(value: float, digits: int) -> float | None:
  """Rounds to `digits` significant digits; None if `value` is not finite."""
  return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def write(path: pathlib.Path, records: Iterable[Record]) -> None:
  """Writes a file of records whole or not at all."""
  text = "".join(json.dumps(record) + "\n" for record in records)
  files_lib.write_file(path, text.encode())
