"""Finished runs that many tools are tried on. Tests must not change them."""

import jax
import pytest

from resnet_flax import train
from resnet_flax.run import mirror


def _train(config, folder):
  train.train_and_evaluate(config, folder / "run", devices=jax.devices()[:1])
  return folder / "run"


@pytest.fixture(scope="session")
def trained(make_tiny_config, tmp_path_factory):
  """The workdir of a run of two epochs on digits."""
  folder = tmp_path_factory.mktemp("trained")
  return _train(make_tiny_config(folder / "cache"), folder)


@pytest.fixture(scope="session")
def mirrored(trained, tmp_path_factory):
  """The address of a mirror of `trained`, without its TensorBoard files."""
  address = str(tmp_path_factory.mktemp("mirrored") / "disk")
  with mirror.Mirror(address, trained):
    pass
  return address


@pytest.fixture(scope="session")
def of_two_seeds(make_tiny_config, tmp_path_factory):
  """The workdir of such a run of two seeds."""
  folder = tmp_path_factory.mktemp("of_two_seeds")
  config = make_tiny_config(folder / "cache")
  config.num_seeds = 2
  return _train(config, folder)
