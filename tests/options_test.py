"""With all optional features on at once, a run keeps its promises."""

import jax
import pytest
from ml_collections import ConfigDict

from tests.helpers import (
  Programs,
  assert_identical,
  assert_same_run,
  at_event,
  die,
  restore,
  saved_steps,
)

pytestmark = pytest.mark.slow

AUGMENT = {
  "alternating_flip": True,
  "trivial_augment": True,
  "cutout": 8,
  "mixup": 0.5,
  "cutmix": 1.0,
}
BRANCH = {"squeeze_excitation": 2, "stochastic_depth": 0.5, "conv_bias": False}
NETWORK = BRANCH | {
  "name": "wide_resnet",
  "depth": 10,
  "widen_factor": 2,
  "block_dropout": 0.3,
  "norm": "group_norm",
  "weight_standardization": True,
}


@pytest.fixture(scope="module")
def config(make_tiny_config, tmp_path_factory):
  config = make_tiny_config(tmp_path_factory.mktemp("cache"))
  config.model.update(NETWORK)
  config.augment.update(AUGMENT)
  config.checkpoint.every_steps = 3
  return config


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
  """Trains in a new workdir or a given one, on so many devices."""
  programs = Programs()

  def train(workdir=None, num_devices=1, on_event=None, **changes):
    workdir = workdir or tmp_path_factory.mktemp("run")
    changed = ConfigDict(config.to_dict() | changes)
    devices = jax.devices()[:num_devices]
    options = {"on_event": on_event} if on_event else {}
    records = programs.train(changed, workdir, devices=devices, **options)
    return workdir, records

  return train


@pytest.fixture(scope="module")
def straight(run):
  return run()


def losses(records):
  return [record["train_loss"] for record in records]


def test_a_run_resumes_within_an_epoch_bit_identically(
  config, straight, run, tmp_path
):
  with pytest.raises(SystemExit):
    run(tmp_path, on_event=at_event("step", 7, die))
  assert saved_steps(tmp_path)[-1] == 6
  run(tmp_path)
  assert_same_run(config, tmp_path, straight[0])


def test_several_steps_per_call_on_several_devices(straight, run):
  """The same draws, whatever call and device an image is in."""
  _, records = run(num_devices=2, steps_per_call=3)
  assert losses(records) == pytest.approx(losses(straight[1]), rel=1e-3)


@pytest.mark.parametrize("execution", ["in_turn", "vectorized"])
def test_a_seed_of_several_is_as_it_is_alone(config, straight, run, execution):
  workdir, records = run(num_seeds=2, seed_execution=execution)
  first = [record["seeds"][0] for record in records]
  assert losses(first) == pytest.approx(losses(straight[1]), rel=1e-3)
  if execution == "in_turn":
    of_two = ConfigDict(config.to_dict() | {"num_seeds": 2})
    both = restore(of_two, workdir)
    one = jax.tree.map(lambda leaf: leaf[0], both)
    assert_identical(one, restore(config, straight[0]))
