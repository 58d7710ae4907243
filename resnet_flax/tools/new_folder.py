"""Writes the output folder of a command as a whole, or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from resnet_flax.run import errors, files, folder as workdir_lib, signals


def resolve(path: str | os.PathLike[str], flag: str) -> pathlib.Path:
  """The local folder that `flag` names, which must be new or empty."""
  folder = errors.resolve(path, flag)  # `os.rename` cannot replace a link.
  workdir_lib.check_name(folder, flag)
  with (
    writing(folder, flag, "Pass another folder."),
    contextlib.suppress(FileNotFoundError),
  ):
    if any(folder.iterdir()):
      raise errors.WorkdirError(
        f"{flag}={folder} must be a new or an empty folder: existing files are"
        " never overwritten. Pass another folder."
      )
  return folder


@contextlib.contextmanager
def fill(folder: pathlib.Path, flag: str) -> Iterator[pathlib.Path]:
  """Yields an empty folder, which is renamed to `folder` at the end.

  The first signal waits until the block ends. After a signal or an error, no
  files are left. An `OSError` in the caller's block becomes a `WorkdirError`.
  """
  prefix = f".unfinished-{folder.name}-"
  with writing(folder, flag, "Nothing was left there. Pass another folder."):
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
      # A signal waits, since Orbax's threads must end before the removal.
      signals.StopSignals() as stops,
      stops.hold(),
      files.temporary_folder(folder.parent, prefix) as temporary,
    ):
      unfinished = temporary / "unfinished"
      unfinished.mkdir()
      yield unfinished
      stops.check()
      # The rename replaces an empty folder; it fails if files came meanwhile.
      os.rename(unfinished, folder)


@contextlib.contextmanager
def writing(folder: pathlib.Path, flag: str, advice: str) -> Iterator[None]:
  """Turns an OSError in the block into a `WorkdirError` about the folder."""
  try:
    yield
  except OSError as error:
    raise errors.WorkdirError(
      f"{flag}={folder} cannot be written:"
      f" {error.strerror or errors.one_line(error)}. {advice}"
    ) from error
