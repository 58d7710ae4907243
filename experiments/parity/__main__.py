"""Trains the Keras example and our v1_depth20 on the same data, in turn.

  python -m experiments.parity --example=cifar10_resnet.py
    --keras_python=PYTHON --workdir=runs/parity [--epochs=20] [--seeds=3]
    [--checks]

The same command resumes our runs; an unfinished Keras run starts again. With
--checks the command trains nothing: it compares augmentation, order and rates.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from configs import v1_depth20
from experiments.parity import checks
from experiments.tools import flag_types
from resnet_flax import data
from resnet_flax.run import environment, files as files_lib, huge_pages

_FOLDER = pathlib.Path(__file__).parent


def _run(command: list[object]) -> None:
  environ = {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
  environ["KERAS_BACKEND"] = "tensorflow"
  subprocess.run(
    [str(part) for part in command], env=os.environ | environ, check=True
  )


def _keras(arguments: argparse.Namespace, *more: object) -> None:
  worker = _FOLDER / "keras_example.py"
  example = arguments.example.absolute()
  _run([arguments.keras_python, worker, f"--example={example}", *more])


def _environment(arguments: argparse.Namespace) -> dict[str, Any]:
  digest = files_lib.digest_of(arguments.example)
  return environment.describe(jax.devices()) | {"example_sha256": digest}


def train(arguments: argparse.Namespace, dataset: data.Dataset) -> None:
  """Trains the missing seeds of both programs; keeps their environments."""
  workdir = arguments.workdir.absolute()
  workdir.mkdir(parents=True, exist_ok=True)
  arrays = workdir / "cifar10.npz"
  (x, y), (x_test, y_test) = (
    split.take(np.arange(len(split))) for split in (dataset.train, dataset.test)
  )
  np.savez(
    arrays,
    train_images=x,
    train_labels=y,
    test_images=x_test,
    test_labels=y_test,
  )
  epochs = arguments.epochs
  for seed in range(arguments.seeds):
    finished = workdir / f"keras-seed{seed}.jsonl"
    if not finished.exists():
      part = finished.with_suffix(".part")
      part.unlink(missing_ok=True)
      described = _environment(arguments)
      _keras(
        arguments,
        *(f"--data={arrays}", f"--out={part}"),
        *(f"--epochs={epochs}", f"--seed={seed}"),
      )
      files_lib.write_json(finished.with_suffix(".environment.json"), described)
      part.rename(finished)
    _run(
      [
        *(sys.executable, "-m", "resnet_flax.main"),
        *("--config=configs/v1_depth20.py", f"--config.num_epochs={epochs}"),
        *(f"--config.seed={seed}", f"--workdir={workdir}/ours-seed{seed}"),
      ]
    )


def main() -> None:
  """Trains with both programs, or compares parts of the recipe."""
  parser = argparse.ArgumentParser("python -m experiments.parity")
  for name in ("example", "keras_python"):
    parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
  parser.add_argument("--workdir", type=pathlib.Path)
  parser.add_argument("--epochs", type=flag_types.count, default=20)
  parser.add_argument("--seeds", type=flag_types.count, default=3)
  parser.add_argument("--checks", action="store_true")
  arguments = parser.parse_args()
  if not arguments.checks and not arguments.workdir:
    parser.error("pass --workdir=DIR, or --checks")
  if not arguments.example.is_file():
    parser.error(
      f"--example={arguments.example} must be the example's file; see README.md"
    )
  config = v1_depth20.get_config()
  dataset = data.load(config.dataset)
  if not arguments.checks:
    train(arguments, dataset)
    return
  results = {"environment": _environment(arguments)}
  images = checks.images(dataset)
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    np.savez(folder / "images.npz", images=images)
    _keras(
      arguments, f"--data={folder}/images.npz", f"--out={folder}/theirs.npz"
    )
    theirs = np.load(folder / "theirs.npz")
    results |= checks.compare(config, images, theirs)
  print(json.dumps(results, indent=2))
  files_lib.write_json(_FOLDER / "checks.json", results)


if __name__ == "__main__":
  # Both programs inherit the setting.
  huge_pages.use()
  main()
