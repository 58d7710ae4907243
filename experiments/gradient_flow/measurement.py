"""Norms of every layer, at initialisation and in the first steps."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import base
from experiments.tools import records as records_lib
from experiments.tools.records import Record
from resnet_flax import data, step as step_lib, train
from resnet_flax.parallel import networks, program
from resnet_flax.run import experiment as experiment_lib, layer_norms, rules

# The fields of `layer_norms.LayerNorms` that a record has.
QUANTITIES = ("gradient", "activation")

# From this depth on, loops more than halve the compile time; see depth_cost.
_LOOPED_DEPTH = 200

# The raw figures have four significant digits.
_rounded = functools.partial(records_lib.rounded, digits=4)


@dataclasses.dataclass(frozen=True)
class Cell:
  """A kind of network, and the steps at which its seeds are measured."""

  family: str  # `model.name`.
  depth: int
  batch_norm: bool  # Whether `model.norm` is batch_norm.
  num_seeds: int
  batch_size: int
  # Steps done before each measurement, ascending; training ends after the last.
  measure_at: tuple[int, ...]

  def config(self) -> ConfigDict:
    """The Keras recipe with this network."""
    config = base.get_config()
    config.num_seeds = self.num_seeds
    config.batch_size = self.batch_size
    config.model.name = self.family
    config.model.depth = self.depth
    config.model.norm = "batch_norm" if self.batch_norm else "none"
    if self.depth >= _LOOPED_DEPTH:
      config.model.scan = config.model.remat = True
    return config

  @property
  def settings(self) -> Record:
    """The fields that identify the cell, as JSON."""
    return dataclasses.asdict(self) | {"measure_at": list(self.measure_at)}


def cells(
  families: Sequence[str],
  depths: Sequence[int],
  init_depths: Sequence[int],
  batch_norm: Sequence[bool],
  num_seeds: int,
  batch_size: int,
  measure_at: Sequence[int],
) -> list[Cell]:
  """The cells to measure, shallow networks first.

  Networks of `init_depths` are measured only at initialisation. Raises
  `ConfigError` if a cell's configuration is invalid.
  """
  steps = {depth: tuple(sorted(set(measure_at))) for depth in depths}
  steps = dict.fromkeys(init_depths, (0,)) | steps
  grid = [
    Cell(family, depth, has_norm, num_seeds, batch_size, steps[depth])
    for depth in sorted(steps)
    for has_norm in batch_norm
    for family in families
  ]
  for cell in grid:
    rules.check(cell.config(), num_devices=jax.device_count())
  return grid


def _step(experiment: step_lib.Experiment, state: step_lib.TrainState, *more):
  """`layer_norms.measured_step`, but its sums count only this step."""
  zeros = jax.tree.map(jnp.zeros_like, state.epoch_sums)
  state = state.replace(epoch_sums=zeros)
  return layer_norms.measured_step(experiment, state, *more)


def measure(
  config: ConfigDict,
  measure_at: Sequence[int],
  devices: Sequence[jax.Device] | None = None,
) -> Record:
  """The norms of all layers after `measure_at` steps, on the next step's batch.

  `layers` has the layers' names in the order of the forward pass. `seeds` has a
  dict for each `seed`. Its `measured` has a dict for each of `measure_at`: the
  `step`, the batch's cross-entropy before it as `loss`, and the `QUANTITIES` as
  lists of one number a layer, None where it is not finite.
  """
  split = data.load(config.dataset).train
  experiment = experiment_lib.build(config)
  layout = networks.Layout.create(config, devices)
  state = train.initial_state(config, experiment, split, layout)
  key = train.augmentation_key(layout)
  measured_step = program.compile_function(
    "training step that measures",
    functools.partial(_step, experiment),
    layout,
    program.step_arguments(experiment, state, config.batch_size, key, layout),
    donate=True,
  )
  batches = itertools.chain.from_iterable(
    program.epoch_batches(split, config.batch_size, epoch, layout)
    for epoch in itertools.count()
  )
  results: list[Record] = [
    {"seed": seed, "measured": []} for seed in layout.seeds
  ]
  for step, batch in enumerate(itertools.islice(batches, measure_at[-1] + 1)):
    state, step_metrics, norms = measured_step(state, *batch, key)
    by_seed = zip(layout.get(step_metrics), layout.get(norms), strict=True)
    for k, (reported, norms_of_seed) in enumerate(by_seed):
      if step in measure_at:
        results[k]["measured"].append(
          {
            "step": step,
            "loss": _rounded(float(reported.sums["loss"]) / config.batch_size),
            **{
              name: [_rounded(float(x)) for x in getattr(norms_of_seed, name)]
              for name in QUANTITIES
            },
          }
        )
  return {"layers": layer_norms.layer_names(experiment), "seeds": results}


def read(path: pathlib.Path) -> list[Record]:
  """The records of a file; none if there is no file."""
  return records_lib.read(path, "cell", "layers", "seeds")


def missing(
  wanted: Sequence[Cell], records: Sequence[Record]
) -> Iterator[Cell]:
  """The cells that the records do not hold yet."""
  done = [record["cell"] for record in records]
  return (cell for cell in wanted if cell.settings not in done)
