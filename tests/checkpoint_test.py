import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from resnet_flax import (
  checkpoint,
  errors,
  experiment as experiment_lib,
  mesh as mesh_lib,
  normalization,
  train_step,
)


def make_state(depth=8, step=0):
  config = base.get_config()
  config.model.update({"depth": depth, "num_filters": 4})
  experiment = experiment_lib.build(config)
  state = train_step.create_train_state(
    experiment,
    jax.random.key(step),
    normalization.placeholder("pixel_mean", (32, 32, 3)),
  )
  return state.replace(step=jnp.asarray(step))


@pytest.fixture(scope="module")
def state():
  return make_state()


def save_epochs(workdir, state, accuracies, first=0):
  with checkpoint.Checkpoints(workdir) as checkpoints:
    for epoch, accuracy in enumerate(accuracies, first):
      checkpoints.save(
        state.replace(step=jnp.asarray(10 * epoch)),
        epoch=epoch,
        accuracy=accuracy,
      )


def kept(workdir):
  with checkpoint.Checkpoints(workdir) as checkpoints:
    return checkpoints.latest_step(), checkpoints.best_step()


def folders(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize(
  ("accuracies", "best"),
  [
    ([0.1], 0),
    ([0.1, 0.2, 0.3], 20),
    ([0.3, 0.2, 0.1], 0),
    ([0.1, 0.5, 0.2, 0.5, 0.3], 10),  # Of two equally good ones the first.
    ([0.0, 0.0, 0.0], 0),
  ],
)
def test_latest_and_best_are_kept(tmp_path, state, accuracies, best):
  save_epochs(tmp_path, state, accuracies)
  latest = 10 * (len(accuracies) - 1)
  assert kept(tmp_path) == (latest, best)
  assert folders(tmp_path) == sorted({latest, best})


def test_best_outlives_a_restart(tmp_path, state):
  save_epochs(tmp_path, state, [0.2, 0.9, 0.3])
  save_epochs(tmp_path, state, [0.4, 0.9, 0.5], first=3)
  assert kept(tmp_path) == (50, 10)


def test_half_written_checkpoints_are_removed_but_by_readers(tmp_path, state):
  save_epochs(tmp_path, state, [0.5])
  unfinished = tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp"
  unfinished.mkdir()
  with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.latest_step() == 0
  assert unfinished.exists()
  assert kept(tmp_path) == (0, 0)
  assert folders(tmp_path) == [0]


def test_full_disk_is_noticed_beforehand(tmp_path, state, monkeypatch):
  save_epochs(tmp_path, state, [0.5])
  usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  with pytest.raises(errors.WorkdirError, match=r"0\.0 MB are free"):
    save_epochs(tmp_path, state, [0.6], first=1)
  monkeypatch.undo()
  assert kept(tmp_path) == (0, 0)


def test_nothing_saved(tmp_path):
  assert kept(tmp_path) == (None, None)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_restore(tmp_path, state, num_devices):
  save_epochs(tmp_path, state, [0.5])
  mesh = mesh_lib.create_mesh(jax.devices()[:num_devices])
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore(0, jax.eval_shape(lambda: state), mesh)
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  assert restored.params["head"]["kernel"].sharding == mesh_lib.replicated(mesh)


def test_another_network_is_one_line(tmp_path, state):
  save_epochs(tmp_path, state, [0.5])
  mesh = mesh_lib.create_mesh(jax.devices()[:1])
  other = jax.eval_shape(lambda: make_state(depth=14))
  with (
    checkpoint.Checkpoints(tmp_path) as checkpoints,
    pytest.raises(errors.WorkdirError, match="cannot be read") as caught,
  ):
    checkpoints.restore(0, other, mesh)
  assert "\n" not in str(caught.value)
  assert folders(tmp_path) == [0]
