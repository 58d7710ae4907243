"""Runs the Keras example's own file in Keras 3.

  python keras_example.py --example=cifar10_resnet.py --data=cifar10.npz
    --out=run.jsonl --epochs=20 --seed=0
  python keras_example.py --example=cifar10_resnet.py --data=cifar10.npz
    --out=checks.npz

This needs Keras with TensorFlow, and nothing of this repository. README.md
names the example and the replacements for features that Keras 3 lacks. Without
--epochs the program trains nothing and writes the arrays for `checks.py`.
"""

import argparse
import ast
import json
import os
import pathlib
import re
import tempfile
import time
from typing import Any

import keras
import numpy as np
from keras.src.legacy.preprocessing import image as legacy

DRAWS = 10_000
ORDERED = 1_000  # Images whose order is compared.


class Record(keras.callbacks.Callback):
  """Writes a JSON line for each epoch, as in metrics.jsonl."""

  def __init__(self, out):
    super().__init__()
    self._out = out

  def on_epoch_begin(self, epoch, logs=None):
    """Starts the clock."""
    self._started, self._seconds = time.perf_counter(), None

  def on_test_begin(self, logs=None):
    """Stops the clock: the epoch's training is over."""
    self._seconds = time.perf_counter() - self._started

  def on_epoch_end(self, epoch, logs=None):
    """Writes the record. Keras's losses include the L2 term."""
    record = {
      "epoch": epoch,
      "learning_rate": float(self.model.optimizer.learning_rate),
      "train_accuracy": logs["accuracy"],
      "train_objective": logs["loss"],
      "test_accuracy": logs["val_accuracy"],
      "test_objective": logs["val_loss"],
      "epoch_seconds": self._seconds,
    }
    with open(self._out, "a") as file:
      file.write(json.dumps(record) + "\n")


def provide(data, out):
  """Gives Keras the functions of Keras 2 that the file calls.

  `data` is an .npz file with the arrays that `cifar10.load_data` returns.
  """
  arrays = np.load(data)
  splits = [
    (arrays[f"{split}_images"], arrays[f"{split}_labels"][:, None])
    for split in ("train", "test")
  ]
  keras.datasets.cifar10.load_data = lambda: splits
  keras.preprocessing.image.ImageDataGenerator = legacy.ImageDataGenerator

  def fit_generator(self, generator, workers, callbacks, **arguments):
    generator.workers = workers
    return self.fit(generator, callbacks=[*callbacks, Record(out)], **arguments)

  keras.Model.fit_generator = fit_generator


def scaled(source, epochs):
  """The file's text with `epochs` epochs and the schedule in proportion.

  The metric that chooses its checkpoints has another name in Keras 3.
  """

  def replace(pattern, new):
    nonlocal source
    source, count = re.subn(pattern, new, source, flags=re.M)
    if count != 1:
      raise SystemExit(
        f"error: {pattern!r} occurs {count} times, not once: --example must be"
        " the example of Keras 2.3.1."
      )

  replace(r"^epochs = 200$", f"epochs = {epochs}")
  replace("monitor='val_acc'", "monitor='val_accuracy'")
  for drop in (180, 160, 120, 80):
    replace(rf"if epoch > {drop}:$", f"if epoch > {drop * epochs / 200}:")
  return source


def parts(source):
  """The file's `lr_schedule` and `datagen`; no other part of it runs."""
  tree = ast.parse(source)
  nodes: list[Any] = [
    node
    for node in ast.walk(tree)
    if ast.unparse(node).startswith(("def lr_schedule(", "datagen = "))
  ]
  names = {
    "ImageDataGenerator": legacy.ImageDataGenerator,
    "print": lambda *_: None,
  }
  code = ast.Module(body=nodes, type_ignores=[])
  exec(compile(code, "cifar10_resnet.py", "exec"), names)
  return names["lr_schedule"], names["datagen"]


def checks(source, data):
  """Learning rates and orders of epochs, and moments of augmented images."""
  schedule, generator = parts(source)
  np.random.seed(0)
  images = np.load(data)["images"]
  moments = []
  for image in images:
    drawn = [generator.random_transform(image) for _ in range(DRAWS)]
    moments.append((np.mean(drawn, axis=0), np.var(drawn, axis=0)))
  numbers = np.arange(ORDERED)
  flow = generator.flow(
    np.zeros((ORDERED, 32, 32, 3), np.float32), numbers, batch_size=32
  )
  orders = []
  for _ in range(3):
    orders.append(np.concatenate([flow[k][1] for k in range(len(flow))]))
    flow.on_epoch_end()
  return {
    "rates": np.array([schedule(epoch) for epoch in range(200)]),
    "moments": np.array(moments, np.float32),
    "orders": np.array(orders),
  }


def main():
  """Trains, or writes the arrays that `checks.py` compares."""
  parser = argparse.ArgumentParser()
  for name in ("example", "data", "out"):
    parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
  parser.add_argument("--epochs", type=int)
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  source = arguments.example.read_text()
  if not arguments.epochs:
    np.savez(arguments.out, **checks(source, arguments.data))
    return
  provide(arguments.data, arguments.out)
  keras.utils.set_random_seed(arguments.seed)
  code = compile(scaled(source, arguments.epochs), "cifar10_resnet.py", "exec")
  with tempfile.TemporaryDirectory() as folder:
    # The file saves checkpoints below the working directory.
    os.chdir(folder)
    exec(code, {"__name__": "__main__"})


if __name__ == "__main__":
  main()
