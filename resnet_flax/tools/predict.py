"""Predicts the classes of pictures with a trained network."""

import argparse
import csv
import glob
import itertools
import json
import logging
import os
import pathlib
import types
import warnings
from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import Any, NoReturn

import numpy as np
import tqdm
from PIL import Image

from resnet_flax.run import errors, files as files_lib, process, surroundings

_logger = logging.getLogger(__name__)


def find(path: str) -> Iterator[str]:
  """Yields the files of a path or a pattern; `DataError` if none matches."""

  def fail(error: OSError) -> NoReturn:
    raise errors.DataError(f"{path} cannot be read: {errors.one_line(error)}")

  if os.path.isdir(path):
    for folder, folders, names in os.walk(path, onerror=fail):
      folders.sort()
      yield from (os.path.join(folder, name) for name in sorted(names))
  elif os.path.lexists(path):
    yield path
  elif matches := glob.glob(path, recursive=True):
    # '**' matches a folder and also the files in it.
    yield from sorted({file for match in matches for file in find(match)})
  else:
    raise errors.DataError(f"PATH={path} must match a file or a folder.")


def predict_files(
  loaded: Any, files: Iterable[str], batch_size: int
) -> Iterator[tuple[str, np.ndarray | str]]:
  """Yields each file and its float32[classes] probabilities, in order.

  For an undecodable file, a text says why. `loaded` is a `LoadedModel`. At most
  `batch_size` files, or the run's `eval_batch_size` if less, are read at once.
  """
  from resnet_flax.data import crops, pictures, streaming
  from resnet_flax.run import environment

  config, files = loaded.config, iter(files)
  shape = loaded.image_shape
  is_streamed = streaming.is_streamed(config.dataset.name)

  def read(path: str) -> Any:
    """uint8[H, W, 3], cut and resized like a test image; or an error's text."""
    try:
      picture = pictures.decode(files_lib.read_bytes(pathlib.Path(path)))
    except Exception as error:
      return errors.one_line(error)
    box = crops.scored(picture.size, shape[1]) if is_streamed else None
    bilinear = Image.Resampling.BILINEAR
    return np.asarray(picture.resize(shape[1::-1], bilinear, box=box))

  size = min(batch_size, config.eval_batch_size)
  with futures.ThreadPoolExecutor(environment.num_cpu_threads()) as pool:
    while names := list(itertools.islice(files, size)):
      decoded = list(pool.map(read, names))
      images = [each for each in decoded if isinstance(each, np.ndarray)]
      # All batches have one size, so that one program is compiled.
      padding = np.zeros((size - len(images), *shape), np.uint8)
      rows = iter(loaded.predict(np.stack([*images, *padding])))
      for name, each in zip(names, decoded, strict=True):
        yield name, each if isinstance(each, str) else next(rows)


def _to_text(name: str) -> str:
  r"""A file's or a folder's name; bytes that are not text become \xff."""
  return os.fsencode(name).decode(errors="backslashreplace")


def _show(loaded: Any, total: int, args: argparse.Namespace) -> int:
  """Prints a row per file, warns of skipped files, and counts the rows."""
  from resnet_flax.tools.report import runs, tables

  num_classes, num_rows = loaded.model.num_classes, 0
  names = loaded.class_names or map(str, range(num_classes))
  classes = [*map(_to_text, names)]
  width, k = max(map(len, classes)), min(args.topk, num_classes)
  output: Any = types.SimpleNamespace(write=surroundings.show)
  # All texts are quoted, since a name may hold any character.
  writer = csv.writer(output, quoting=csv.QUOTE_NONNUMERIC, lineterminator="")
  if args.format == "csv":
    titles = ([f"class_{n + 1}", f"probability_{n + 1}"] for n in range(k))
    writer.writerow(sum(titles, ["path"]))
  files = itertools.chain.from_iterable(map(find, args.paths))
  with tqdm.tqdm(total=total, unit=" files", leave=False, disable=None) as bar:
    for name, result in predict_files(loaded, files, args.batch_size):
      bar.update()
      with bar.external_write_mode():
        path = _to_text(name)
        if isinstance(result, str):
          _logger.warning("%s", runs.shown(f"skipped {path}: {result}"))
          continue
        best = np.argsort(-result, kind="stable")[:k]
        pairs = [(classes[each], float(result[each])) for each in best]
        if args.format == "csv":
          writer.writerow(map(tables.no_formula, [path, *sum(pairs, ())]))
        elif args.format == "json":
          entries = [{"class": label, "probability": p} for label, p in pairs]
          row = {"path": path, "classes": entries}
          surroundings.show(f"{',' if num_rows else '['}{json.dumps(row)}")
        else:
          parts = [f"{label:{width}} {p:7.2%}" for label, p in pairs]
          surroundings.show(runs.shown("  ".join([*parts, path])))
        num_rows += 1
  if args.format == "json":
    surroundings.show("]" if num_rows else "[]")
  return num_rows


def main(argv: list[str]) -> None:
  """Runs the command line."""
  parser = process.Parser("python -m resnet_flax.predict", description=__doc__)
  add = parser.add_argument
  add("workdir", metavar="WORKDIR", help="folder of the network's run")
  add("paths", metavar="PATH", nargs="+", help="file, pattern or whole folder")
  add("--topk", type=int, default=5, help="classes per picture")
  add("--format", choices=["table", "csv", "json"], default="table")
  add("--strict", action="store_true", help="fail if a file is skipped")
  add("--checkpoint", choices=["best", "latest"], default="best")
  add("--weights", choices=["raw", "ema", "swa"], default="raw")
  add("--batch_size", type=int, default=32, help="pictures per batch")
  add("--seed", type=int, help="seed of a run of several; default: the first")
  args = parser.parse_intermixed_args(argv[1:])
  if min(args.topk, args.batch_size) < 1:
    values = f"--topk={args.topk} and --batch_size={args.batch_size}"
    parser.error(f"{values} must be at least 1")
  total = sum(1 for path in args.paths for _ in find(path))
  surroundings.set_up()
  from resnet_flax.run import load

  # Pillow warns of pictures that are skipped anyway, or that are harmless.
  warnings.filterwarnings("ignore", module="PIL")
  loaded = load.load_model(
    args.workdir, args.checkpoint, seed=args.seed, weights=args.weights
  )
  num_rows = _show(loaded, total, args)
  if not num_rows or (args.strict and num_rows < total):
    outcome = f"only {num_rows} of {total} files can be decoded"
    hint = "Pass pictures" + ", or leave out --strict" * bool(num_rows)
    raise errors.DataError(f"{outcome}. {hint}.")
