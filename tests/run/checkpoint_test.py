import gc
import hashlib
import json
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from resnet_flax import step as step_lib
from resnet_flax.data import normalize
from resnet_flax.run import checkpoint, errors
from tests.helpers import contents
from tests.run import damage

NOTES = {"learning_rate": [0.1], "epoch_seconds": 2.5, "data_seconds": 0.5}


def make_state(width=4, blocks=2):
  """A small state with every part of a real one."""
  key = jax.random.key(0)
  params = {
    f"block{k}": {"kernel": jax.random.normal(key, (3, 3, width, width))}
    for k in range(blocks)
  }
  return step_lib.TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats={"bn": {"mean": jnp.arange(width, dtype=jnp.float32)}},
    opt_state=({"mu": params, "count": jnp.zeros((), jnp.int32)},),
    rate_state={"scale": jnp.ones(())},
    epoch_sums={"count": jnp.float32(8), "loss": jnp.float32(2.5)},
    normalization=normalize.placeholder("pixel_mean", (8, 8, 3)),
  )


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


def diverge(checkpoints):
  checkpoints._manifest = {"step": 30}
  raise errors.NonFiniteError("it diverged")


def test_another_runs_checkpoints_are_kept(tmp_path, state):
  """The other run began anew in the folder and did the same steps."""
  save(tmp_path, state, 10, 20, 30, best=(10,))
  taken = checkpoint.Checkpoints(tmp_path, is_taken=lambda: True)
  with pytest.raises(errors.NonFiniteError), taken:
    diverge(taken)
  assert folders(tmp_path) == [10, 20, 30]


def restore_latest(workdir, like):
  with checkpoint.Checkpoints(workdir) as checkpoints:
    return checkpoints.restore_latest(jax.eval_shape(lambda: like))


def files(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def reseal(folder, change, without=()):
  """Writes a manifest with other values that fits its digest."""
  path = folder / "manifest.json"
  manifest = json.loads(path.read_text()) | change
  for key in ("sha256", *without):
    del manifest[key]
  digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
  path.write_text(json.dumps(manifest | {"sha256": digest}))


def flip(path):
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(raw)


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


def test_a_run_that_cannot_be_opened_keeps_the_best(tmp_path, state):
  """The records name the best, and may be the files that cannot be read."""
  save(tmp_path, state, 10, 20, 30, best=(10,))
  with (
    pytest.raises(errors.WorkdirError),
    checkpoint.Checkpoints(tmp_path),
  ):
    raise errors.WorkdirError("metrics.jsonl, line 2")
  assert folders(tmp_path) == [10, 20, 30]


def test_a_best_epoch_whose_save_failed_does_not_cost_the_one_before(
  tmp_path, state
):
  save(tmp_path, state, 10, 20, 30, best=(10,))
  best = [10]

  def use():
    with checkpoint.Checkpoints(
      tmp_path, best_steps=lambda: best, on_event=fail
    ) as checkpoints:
      checkpoints.save(at(state, 40), NOTES)
      best[:] = [40]  # It is recorded while it is written.
      checkpoints.wait()

  with pytest.raises(OSError, match="RESOURCE_EXHAUSTED"):
    use()
  assert checkpoint.steps(tmp_path) == [10, 20, 30]


def test_half_written_checkpoints_are_removed_but_by_readers(tmp_path, state):
  save(tmp_path, state, 0)
  unfinished = tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp"
  unfinished.mkdir()
  assert checkpoint.steps(tmp_path) == [0]
  assert unfinished.exists()
  with checkpoint.Checkpoints(tmp_path):
    assert checkpoint.steps(tmp_path) == [0]
  assert folders(tmp_path) == [0]


def test_full_disk_is_noticed_beforehand(tmp_path, state, monkeypatch):
  save(tmp_path, state, 0)
  monkeypatch.setattr(checkpoint, "SPACE_FACTOR", 10**12)
  with pytest.raises(
    errors.WorkdirError, match="free some space, and the same"
  ):
    save(tmp_path, state, 10)
  assert folders(tmp_path) == [0]


def fail(event):
  assert event == "manifest"
  raise ValueError("RESOURCE_EXHAUSTED")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
  ("error", "reported"),
  [
    (None, (OSError, "RESOURCE_EXHAUSTED")),
    (errors.WorkdirError("full"), (errors.WorkdirError, "full")),
  ],
)
def test_failing_to_finish_is_an_error_but_hides_no_other(
  tmp_path, state, error, reported
):
  def use():
    with checkpoint.Checkpoints(tmp_path, on_event=fail) as checkpoints:
      checkpoints.save(state, NOTES)
      if error is not None:
        raise error

  kind, text = reported
  with pytest.raises(kind, match=text):
    use()


def test_nothing_saved_leaves_nothing(tmp_path):
  with checkpoint.Checkpoints(tmp_path):
    pass
  assert list(tmp_path.iterdir()) == []


def test_restores_what_several_devices_had(tmp_path, state):
  mesh = Mesh(np.asarray(jax.devices()), "data")
  everywhere = NamedSharding(mesh, PartitionSpec())
  save(tmp_path, jax.device_put(state, everywhere), 7)
  restored, notes = restore_latest(tmp_path, state)
  jax.tree.map(np.testing.assert_array_equal, restored, at(state, 7))
  assert notes == NOTES


@pytest.mark.parametrize(
  ("other", "message"),
  [
    (
      make_state(blocks=3),
      "holds another network: params/block2/kernel is missing there,"
      " float32[3, 3, 4, 4] here. Use",
    ),
    (
      make_state(width=6),
      "holds another network: params/block0/kernel is float32[3, 3, 4, 4]"
      " there, float32[3, 3, 6, 6] here. Use",
    ),
    (
      make_state().replace(batch_stats={}),
      "holds another network: batch_stats/bn/mean is float32[4] there, missing"
      " here. Use",
    ),
    (
      make_state().replace(opt_state=(jnp.zeros(3),)),
      "holds another optimizer: opt_state/0 is missing there, float32[3] here."
      " Use",
    ),
    (
      make_state().replace(rate_state={}),
      "holds another schedule: rate_state/scale is float32[] there, missing"
      " here. Use",
    ),
    (
      make_state().replace(
        normalization=normalize.placeholder("pixel_mean", (4, 4, 3))
      ),
      "holds another normalization: normalization/mean is float32[8, 8, 3]",
    ),
  ],
)
def test_what_does_not_match_is_said_for_what_it_is(
  tmp_path, state, other, message
):
  save(tmp_path, state, 0)
  with pytest.raises(errors.WorkdirError) as caught:
    restore_latest(tmp_path, other)
  assert message in str(caught.value)
  assert folders(tmp_path) == [0]


def test_metrics_are_no_part_of_what_a_run_is(tmp_path, state):
  save(tmp_path, state, 3)
  sums = {"accuracy": jnp.float32(1), "count": jnp.float32(0)}
  restored, _ = restore_latest(tmp_path, state.replace(epoch_sums=sums))
  np.testing.assert_equal(restored.epoch_sums, {"accuracy": np.nan, "count": 8})
  expected = at(state, 3).replace(epoch_sums=restored.epoch_sums)
  jax.tree.map(np.testing.assert_array_equal, restored, expected)


@pytest.mark.parametrize("number", [2, 1000])
def test_another_format_is_named(tmp_path, state, number):
  save(tmp_path, state, 0)
  reseal(tmp_path / "checkpoints/0", {"format": number})
  with pytest.raises(
    errors.WorkdirError, match=rf"has format {number}; .*reads format \d"
  ):
    restore_latest(tmp_path, state)
  assert folders(tmp_path) == [0]


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
  """If one file is damaged, the same state or the earlier one is restored."""
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


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"files": {"/dev/zero": "0"}}, "/dev/zero is missing"),
    ({"files": {"../../pipe": "0"}}, "pipe is missing"),
    ({"files": {"/no/such": "0"}}, "/no/such is missing"),
    ({"step": 1}, "its step is 1; rename it back"),
    *(({}, key) for key in ("format", "files")),
  ],
)
def test_a_manifest_that_no_run_writes_is_damage(
  two_checkpoints, state, tmp_path, change, message, caplog
):
  """The program does not hang, and uses the checkpoint before it."""
  workdir = tmp_path / "run"
  shutil.copytree(two_checkpoints, workdir)
  os.mkfifo(workdir / "pipe")
  reseal(workdir / "checkpoints/2", change, () if change else [message])
  restored, _ = restore_latest(workdir, state)
  assert int(restored.step) == 1
  assert message in caplog.text
  assert (workdir / "damaged/2").is_dir()


@pytest.mark.parametrize("kind", ["pipe", "device", "deep", "long"])
def test_a_manifest_that_cannot_be_read_is_damage(
  two_checkpoints, state, tmp_path, kind
):
  workdir = tmp_path / "run"
  shutil.copytree(two_checkpoints, workdir)
  path = workdir / "checkpoints/2/manifest.json"
  damage.replace(path, kind)
  assert int(restore_latest(workdir, state)[0].step) == 1


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
    assert checkpoint.steps(workdir) == [1]
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
def test_what_cannot_be_read_again_is_not_finished(tmp_path, state):
  """As where Orbax does not find its own files to merge."""
  save(tmp_path, state, 1)

  def lose(event):
    assert event == "manifest"
    (merged,) = tmp_path.glob("checkpoints/2.*/state/manifest.ocdbt")
    merged.unlink()

  with (
    pytest.raises(OSError, match=r"manifest\.ocdbt was not written"),
    checkpoint.Checkpoints(tmp_path, on_event=lose) as checkpoints,
  ):
    checkpoints.save(at(state, 2), NOTES)
  assert restore_latest(tmp_path, state)[0].step == 1
