"""A folder that a command writes: whole, or not at all."""

import contextlib
import glob
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from resnet_flax.run import errors, folder as workdir_lib, signals


def resolve(path: str | os.PathLike[str], flag: str) -> pathlib.Path:
  """The local folder that `flag` names, which can be filled.

  Raises:
    ConfigError: it is no local path.
    WorkdirError: it holds something, or cannot be written.
  """
  # Where a link leads: the link itself cannot be replaced by a folder. Unlike
  # Path.resolve, this leaves it to _check_is_new to find a loop of links.
  folder = pathlib.Path(os.path.realpath(errors.local_path(path, flag)))
  workdir_lib.check_name(folder, flag)
  _check_is_new(folder, flag)
  return folder


@contextlib.contextmanager
def fill(folder: pathlib.Path, flag: str) -> Iterator[pathlib.Path]:
  """Gives an empty folder beside `folder`, and at the end puts it there.

  A signal is held until then; it and errors leave nothing.

  Raises:
    WorkdirError: somebody has filled it meanwhile, or it cannot be written; an
      OSError from inside is taken for that.
  """
  prefix = f".unfinished-{folder.name}-"
  with writing(folder, flag, "Nothing was left there; pass another one."):
    folder.parent.mkdir(parents=True, exist_ok=True)
    # What a killed command for this folder has left.
    for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
      shutil.rmtree(left, ignore_errors=True)
    with (
      tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as beside,
      # Orbax's threads must have ended before the folder is removed.
      signals.StopSignals() as stops,
      stops.hold(),
    ):
      unfinished = pathlib.Path(beside) / "unfinished"
      unfinished.mkdir()
      yield unfinished
      stops.check()
      _check_is_new(folder, flag)
      # An empty folder is replaced, one that was filled meanwhile is not.
      os.rename(unfinished, folder)


@contextlib.contextmanager
def writing(folder: pathlib.Path, flag: str, advice: str) -> Iterator[None]:
  """Makes an OSError from inside a `WorkdirError` that names the folder."""
  try:
    yield
  except OSError as error:
    raise errors.WorkdirError(
      f"{flag}={folder} cannot be written:"
      f" {error.strerror or errors.one_line(error)}. {advice}"
    ) from error


def _check_is_new(folder: pathlib.Path, flag: str) -> None:
  with (
    writing(folder, flag, "Pass another one."),
    contextlib.suppress(FileNotFoundError),
  ):
    if any(folder.iterdir()):
      raise errors.WorkdirError(
        f"{flag}={folder} holds something already, and nothing is overwritten."
        " Pass a new one."
      )
