import gc
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from resnet_flax import step as step_lib
from resnet_flax.data import normalize as normalization
from resnet_flax.parallel import mesh as mesh_lib
from resnet_flax.run import checkpoint, errors

NOTES = {"learning_rate": 0.1, "epoch_seconds": 2.5}


def make_state(depth=8, step=0, num_filters=4):
  config = base.get_config()
  config.model.update({"depth": depth, "num_filters": num_filters})
  experiment = step_lib.build(config)
  state = step_lib.create_train_state(
    experiment,
    jax.random.key(step),
    normalization.placeholder("pixel_mean", (32, 32, 3)),
  )
  return state.replace(step=jnp.asarray(step))


@pytest.fixture(scope="module")
def state():
  return make_state()


def at(state, step):
  """The state, made to differ between steps."""
  return state.replace(
    step=jnp.asarray(step),
    params=jax.tree.map(lambda x: x + step, state.params),
  )


def save(workdir, state, *steps, best=()):
  with checkpoint.Checkpoints(workdir, best_steps=lambda: best) as checkpoints:
    for step in steps:
      checkpoints.save(at(state, step), NOTES)


def folders(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def restore_latest(workdir, like):
  with checkpoint.Checkpoints(workdir) as checkpoints:
    return checkpoints.restore_latest(jax.eval_shape(lambda: like))


def files(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def contents(folder):
  return {path.relative_to(folder): path.read_bytes() for path in files(folder)}


def flip(path):
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(raw)


def test_one_array_for_each_dtype(tmp_path, state):
  """TensorStore loses memory with every array that it writes."""
  save(tmp_path, state, 0)
  dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(state)}
  metadata = json.loads(
    (tmp_path / "checkpoints" / "0" / "state" / "_METADATA").read_text()
  )
  assert len(metadata["tree_metadata"]) == len(dtypes) == 2


def test_saving_does_not_lose_memory(tmp_path, state):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:

    def blocks_after(*steps):
      for step in steps:
        checkpoints.save(at(state, step), NOTES)
        checkpoints.wait()
      gc.collect()
      return sys.getallocatedblocks()

    before = blocks_after(*range(5))
    after = blocks_after(*range(5, 15))
  # About 30 for each; with an array for each leaf it would be 500.
  assert after - before < 1000


@pytest.mark.parametrize(
  ("steps", "best", "kept"),
  [
    ([4], (), [4]),
    ([1, 2, 3, 4], (), [3, 4]),
    ([1, 2, 3, 4], (1,), [1, 3, 4]),
    ([1, 2, 3, 4], (4,), [3, 4]),
    # Of several seeds, each has its own.
    ([1, 2, 3, 4, 5], (1, 3, 1), [1, 3, 4, 5]),
  ],
)
def test_the_latest_two_and_the_best_are_kept(
  tmp_path, state, steps, best, kept
):
  save(tmp_path, state, *steps, best=best)
  assert folders(tmp_path) == kept


def test_the_best_outlives_a_restart(tmp_path, state):
  save(tmp_path, state, 10, 20, best=(10,))
  save(tmp_path, state, 30, 40, 50, best=(10,))
  assert folders(tmp_path) == [10, 40, 50]


def test_half_written_checkpoints_are_removed_but_by_readers(tmp_path, state):
  save(tmp_path, state, 0)
  unfinished = tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp"
  unfinished.mkdir()
  with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.steps() == [0]
  assert unfinished.exists()
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [0]
  assert folders(tmp_path) == [0]


def test_full_disk_is_noticed_beforehand(tmp_path, state, monkeypatch):
  save(tmp_path, state, 0)
  usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  with pytest.raises(errors.WorkdirError, match=r"0\.0 MB are free"):
    save(tmp_path, state, 10)
  monkeypatch.undo()
  assert folders(tmp_path) == [0]


def close_after_a_failed_save(tmp_path, monkeypatch, error):
  def fail():
    raise ValueError("RESOURCE_EXHAUSTED")

  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    monkeypatch.setattr(checkpoints._manager, "close", fail)
    if error is not None:
      raise error


def test_closing_hides_no_other_error(tmp_path, monkeypatch):
  error = errors.WorkdirError("no space left")
  with pytest.raises(errors.WorkdirError, match="no space left"):
    close_after_a_failed_save(tmp_path, monkeypatch, error)


def test_failing_to_close_is_an_error(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED"):
    close_after_a_failed_save(tmp_path, monkeypatch, None)


def test_nothing_saved_leaves_nothing(tmp_path, state):
  assert restore_latest(tmp_path, state) is None
  assert list(tmp_path.iterdir()) == []


def test_restores_what_several_devices_had(tmp_path, state):
  mesh = mesh_lib.create_mesh()
  save(tmp_path, jax.device_put(state, mesh_lib.replicated(mesh)), 7)
  restored, notes = restore_latest(tmp_path, state)
  jax.tree.map(np.testing.assert_array_equal, restored, at(state, 7))
  assert notes == NOTES


@pytest.mark.parametrize(
  ("other", "message"),
  [
    (
      {"depth": 14},
      r"params/stage1_block2/\S+ is no such array there, float32\[4\] here",
    ),
    (
      {"num_filters": 6},
      r"params/head/kernel is float32\[16, 10\] there, float32\[24, 10\] here",
    ),
  ],
)
def test_another_network_names_the_first_difference(
  tmp_path, state, other, message
):
  save(tmp_path, state, 0)
  with pytest.raises(errors.WorkdirError, match="another network") as caught:
    restore_latest(tmp_path, make_state(**other))
  assert caught.match(message)
  assert "\n" not in str(caught.value)
  assert folders(tmp_path) == [0]


def test_older_format_is_named(tmp_path, state):
  save(tmp_path, state, 0)
  (tmp_path / "checkpoints/0/state").rename(tmp_path / "checkpoints/0/default")
  with pytest.raises(errors.WorkdirError, match="an older version"):
    restore_latest(tmp_path, state)
  assert folders(tmp_path) == [0]


def test_newer_format_is_named(tmp_path, state, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, "_FORMAT", 1000)
    save(tmp_path, state, 0)
  with pytest.raises(
    errors.WorkdirError, match=r"has format 1000; .*reads format \d"
  ):
    restore_latest(tmp_path, state)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory, state):
  workdir = tmp_path_factory.mktemp("run")
  save(workdir, state, 1, 2)
  return workdir


def damage_each_file(workdir, folder):
  """Every file of a checkpoint, flipped, cut short, emptied, removed."""
  count = len(files(workdir / folder))
  return [
    (index, how)
    for index in range(count)
    for how in ("flip", "halve", "empty", "remove")
  ]


def test_damage_is_never_restored(two_checkpoints, state, tmp_path):
  """Whatever happens to one file: the same state, or the one before it."""
  like = jax.eval_shape(lambda: state)
  outcomes = []
  for index, how in damage_each_file(two_checkpoints, "checkpoints/2"):
    workdir = tmp_path / f"{index}-{how}"
    shutil.copytree(two_checkpoints, workdir)
    path = files(workdir / "checkpoints/2")[index]
    if how == "flip":
      flip(path)
    elif how == "halve":
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
      path.write_bytes(b"")
    else:
      path.unlink()
    with checkpoint.Checkpoints(workdir) as checkpoints:
      restored, notes = checkpoints.restore_latest(like)
    step = int(restored.step)
    jax.tree.map(np.testing.assert_array_equal, restored, at(state, step))
    assert notes == NOTES
    if step == 1:
      assert contents(workdir / "checkpoints/1") == contents(
        two_checkpoints / "checkpoints/1"
      )
      # What is damaged is not lost either.
      name = path.relative_to(workdir / "checkpoints")
      assert (workdir / "damaged/2").is_dir()
      assert (workdir / "damaged" / name).exists() == (how != "remove")
    outcomes.append(step)
  assert {1, 2} == set(outcomes)


def largest(folder):
  return max(files(folder), key=lambda path: path.stat().st_size)


def test_falling_back_says_so_and_goes_on(
  two_checkpoints, state, tmp_path, caplog
):
  workdir = tmp_path / "run"
  shutil.copytree(two_checkpoints, workdir)
  flip(largest(workdir / "checkpoints/2/state"))
  with checkpoint.Checkpoints(workdir) as checkpoints:
    restored, _ = checkpoints.restore_latest(jax.eval_shape(lambda: state))
    assert int(restored.step) == 1
    assert checkpoints.has_fallen_back(1)
    assert not checkpoints.has_fallen_back(2)
    assert checkpoints.steps() == [1]
    # The step that was damaged can be saved again.
    checkpoints.save(at(state, 2), NOTES)
  assert "checkpoints/2 is damaged" in caplog.text
  assert "going back to the checkpoint of step 1" in caplog.text
  restored, _ = restore_latest(workdir, state)
  assert int(restored.step) == 2
  # Damaged twice: both are kept.
  flip(largest(workdir / "checkpoints/2/state"))
  restore_latest(workdir, state)
  assert {path.name for path in (workdir / "damaged").iterdir()} == {"2", "2-1"}


def test_no_good_checkpoint_is_refused_and_nothing_deleted(
  two_checkpoints, state, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(two_checkpoints, workdir)
  for step in (1, 2):
    flip(largest(workdir / f"checkpoints/{step}/state"))
  before = contents(workdir)
  with pytest.raises(errors.WorkdirError, match="is good") as caught:
    restore_latest(workdir, state)
  assert "\n" not in str(caught.value)
  assert contents(workdir) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_cannot_be_read_again_is_not_finished(
  tmp_path, state, monkeypatch
):
  """As where Orbax does not find its own files to merge."""
  save(tmp_path, state, 1)
  monkeypatch.setattr(checkpoint, "_MERGED", "never written")
  with pytest.raises(OSError, match="never written"):
    save(tmp_path, state, 2)
  monkeypatch.undo()
  assert restore_latest(tmp_path, state)[0].step == 1
