"""Evaluates a trained network on a plane of its weights (Li et al. 2018)."""

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tools import records as records_lib
from experiments.tools.records import Record
from resnet_flax import data, step as step_lib
from resnet_flax.run import environment, errors, folder, load

PyTree = Any
# Gives the mean loss and the share of errors at a point (alpha, beta).
Score = Callable[[float, float], tuple[float, float]]


def axis(record: Record) -> np.ndarray:
  """The coordinates of a record's points in both directions, float64[points].

  The middle coordinate, zero, is at the trained weights.
  """
  plane = record["of"]["plane"]
  half = plane["points"] // 2
  return plane["extent"] * np.arange(-half, half + 1) / half


def directions(params: PyTree, seed: int) -> tuple[PyTree, PyTree]:
  """Two random directions, normalised by filter (Li et al. 2018, section 4).

  Each filter of a Gaussian direction is scaled to the norm of the network's
  filter. A filter makes one channel or one logit; a kernel's last axis counts
  filters. Biases and parameters of batch norm have one axis and do not move, as
  with `ignore=biasbn` in the authors' program.
  """
  rng = np.random.default_rng(seed)

  def draw(weights: np.ndarray) -> np.ndarray:
    if weights.ndim < 2:
      return np.zeros_like(weights)
    drawn = rng.standard_normal(weights.shape, np.float32)
    norms, drawn_norms = (
      np.sqrt(np.sum(x**2, axis=tuple(range(x.ndim - 1)), keepdims=True))
      for x in (weights, drawn)
    )
    return drawn * (norms / drawn_norms)

  return jax.tree.map(draw, params), jax.tree.map(draw, params)


def open_run(
  workdir: pathlib.Path, plane: dict[str, Any]
) -> tuple[Record, Score]:
  """An empty record of a run's latest weights, and the score that fills it.

  `of` identifies the record: the run's `config`, `step` and `data`, and the
  `plane`. The record also has facts and an empty grid. A plane has `points`
  (the number on an axis), `extent` (of an axis from 0), `examples` (the first
  training images that count) and `seed` (of the directions).

  The score is in inference mode: at every point, batch norm has the running
  statistics of the trained weights. Raises `ConfigError` if the run has too few
  images or is not float32.
  """
  loaded = load.load_model(workdir, "latest")
  config = loaded.config
  if config.model.dtype != "float32":
    raise errors.ConfigError(
      f"model.dtype={config.model.dtype} of {workdir} must be float32: the"
      " differences of neighbours would be rounded away."
    )
  dataset = data.load(config.dataset)
  folder.check_data(workdir, dataset.source)
  split, count = dataset.train.one_crop(), plane["examples"]
  if count > len(split):
    raise errors.ConfigError(
      f"--examples={count} must be at most {len(split)}, the training images of"
      f" {workdir}."
    )
  of = {"config": config.to_dict(), "step": loaded.step}
  of |= {"data": dataset.source, "plane": plane}
  record = {
    "of": json.loads(json.dumps(of)),  # Tuples become lists.
    "epochs": loaded.step / (len(split) // config.batch_size),
    "trained_in": folder.read_environment(workdir),
    "environments": [],
    **{"seconds": 0.0, "loss": [], "error": []},
  }

  # The weights move from all devices to the one that scores the batches.
  variables = jax.device_get(loaded.variables)
  arrays = variables, *directions(variables["params"], plane["seed"])
  arrays = jax.device_put(arrays, jax.devices()[0])

  @jax.jit
  def sums(variables, first, second, alpha, beta, images, labels):
    params = jax.tree.map(
      lambda w, a, b: w + alpha * a + beta * b,
      *(variables["params"], first, second),
    )
    logits: Any = loaded.model.apply(
      {**variables, "params": params}, images, train=False
    )
    wrong = jnp.sum(jnp.argmax(logits, axis=-1) != labels)
    return jnp.sum(step_lib.cross_entropy(logits, labels)), wrong

  images, labels = split.take(np.arange(count))
  images = np.asarray(loaded.preprocess(jnp.asarray(images)))
  size = config.eval_batch_size

  def score(alpha: float, beta: float) -> tuple[float, float]:
    point = *arrays, np.float32(alpha), np.float32(beta)
    batch_sums = [
      sums(*point, images[k : k + size], labels[k : k + size])
      for k in range(0, count, size)
    ]
    loss, wrong = np.asarray(batch_sums, np.float64).sum(axis=0) / count
    return loss, wrong

  return record, score


def measure(record: Record, score: Score, path: pathlib.Path) -> None:
  """Evaluates the rows that the file lacks, and writes it after each row."""
  records = records_lib.read(path)
  earlier = [each for each in records if each["of"] == record["of"]]
  if earlier:
    (record,) = earlier
  else:
    records.append(record)
  described = environment.describe(jax.devices()[:1])
  if described not in record["environments"]:
    record["environments"].append(described)
  coordinates = axis(record)
  for alpha in coordinates[len(record["loss"]) :]:
    began = time.perf_counter()
    row = np.array([score(alpha, beta) for beta in coordinates])
    for name, values in zip(("loss", "error"), row.T, strict=True):
      record[name].append([records_lib.rounded(x, digits=6) for x in values])
    record["seconds"] = round(
      record["seconds"] + time.perf_counter() - began, 2
    )
    records_lib.write(path, records)
    done = f"row {len(record['loss'])} of {len(coordinates)}"
    name = record["of"]["config"]["model"]["name"]
    print(f"{name}: {done}, {record['seconds']:.0f} s", flush=True)
