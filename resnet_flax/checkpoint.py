"""Checkpoints of the latest and of the best epoch, over Orbax."""

import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers as policies

from resnet_flax import errors, mesh as mesh_lib, train_step

# Orbax writes what it saves, then once more as it merges its files; asked
# beforehand, since its threads meet a full disk in many noisy ways.
_SPACE_FACTOR = 3


def _rank(metrics: dict[str, Any]) -> tuple[float, int]:
  # Of two equally good epochs the first is kept, as Keras does.
  return metrics["accuracy"], -metrics["epoch"]


class Checkpoints:
  """The checkpoints of one workdir: the latest epoch's and the best one's.

  A context manager; leaving it waits for what is still being written.
  """

  def __init__(self, workdir: pathlib.Path, *, read_only: bool = False):
    """Opens `workdir`/checkpoints.

    Args:
      workdir: the run's folder.
      read_only: neither create nor clean up nor save anything, so that a run
        can be read while it goes on.
    """
    self._folder = (workdir / "checkpoints").absolute()
    if not read_only and self._folder.exists():
      # A killed run's half-written checkpoint is of no use to anyone. Orbax's
      # own cleanup would outlive a run that fails at once, in a thread.
      for unfinished in ocp.utils.tmp_checkpoints(self._folder):
        shutil.rmtree(unfinished.get(), ignore_errors=True)
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
          [
            policies.LatestN(1),
            policies.BestN(
              get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False
            ),
          ]
        ),
        # Without it Orbax would not write the metrics to disk.
        best_fn=lambda metrics: metrics["accuracy"],
        create=not read_only,
        read_only=read_only,
        save_interval_steps=0 if read_only else 1,
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception: object) -> None:
    self._manager.close()

  def save(
    self, state: train_step.TrainState, *, epoch: int, accuracy: float
  ) -> None:
    """Starts to save the state at the end of an epoch; returns at once.

    Args:
      state: what to save; may be donated as soon as this returns.
      epoch: 0-based, just finished.
      accuracy: chooses the best epoch.

    Raises:
      WorkdirError: the disk has no room for it.
    """
    needed = _SPACE_FACTOR * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(self._folder).free
    if free < needed:
      raise errors.WorkdirError(
        f"no space left for a checkpoint in {self._folder}: it needs"
        f" {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free. The checkpoints"
        " there are good; make room, and the same command goes on from them."
      )
    self._manager.save(
      int(state.step),
      args=ocp.args.StandardSave(state),
      metrics={"accuracy": accuracy, "epoch": epoch},
    )

  def wait(self) -> None:
    """Waits until everything that was saved is on disk."""
    self._manager.wait_until_finished()

  def latest_step(self) -> int | None:
    """The step of the latest checkpoint, or None."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """The step of the checkpoint of the best epoch, or None."""
    metrics = {
      step: self._manager.metrics(step) for step in self._manager.all_steps()
    }
    ranked = {step: _rank(found) for step, found in metrics.items() if found}
    return max(ranked, key=lambda step: ranked[step]) if ranked else None

  def restore(
    self, step: int, like: train_step.TrainState, mesh: Mesh
  ) -> train_step.TrainState:
    """Reads a checkpoint onto the devices of a mesh.

    Args:
      step: one of the steps there are.
      like: the tree of shapes and dtypes, for example from `jax.eval_shape`.
      mesh: gets a copy of the state on every device.

    Raises:
      WorkdirError: the checkpoint cannot be read or is of another network.
    """
    sharding = mesh_lib.replicated(mesh)
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like
    )
    try:
      return self._manager.restore(step, args=ocp.args.StandardRestore(target))
    # Orbax and TensorStore raise many kinds, according to what is damaged.
    except Exception as error:
      raise errors.WorkdirError(
        f"checkpoint {self._folder / str(step)} cannot be read"
        f" ({errors.one_line(error)}). Nothing was changed. Restore that"
        " folder, or start again in another --workdir."
      ) from error
