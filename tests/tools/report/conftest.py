import jax
import pytest

from resnet_flax import train


@pytest.fixture(scope="session")
def trained(make_tiny_config, tmp_path_factory):
  """The workdir of a run on digits that is finished."""
  folder = tmp_path_factory.mktemp("trained")
  config = make_tiny_config(folder / "cache")
  train.train_and_evaluate(config, folder / "run", devices=jax.devices()[:1])
  return folder / "run"
