"""Trains residual networks, scores a trained one, or prints what one is.

python -m resnet_flax.main --config=configs/v1_depth20.py [--workdir=DIR]
  [--mode=train|eval|summary] [--config.model.depth=56 ...]
"""

import pathlib
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from resnet_flax.run import command_line, errors, process

# For --help.
flags.adopt_module_key_flags(process)
flags.adopt_module_key_flags(command_line)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "eval", "summary"],
  "train: train, or resume training. eval: score a checkpoint of --workdir on"
  " the test split; needs no --config. summary: print the network, optimizer"
  " and schedule.",
)
_CHECKPOINT = flags.DEFINE_enum(
  "checkpoint", "best", ["best", "latest"], "Which one --mode=eval scores."
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address",
  None,
  "Several hosts: HOST:PORT of process 0, or $JAX_COORDINATOR_ADDRESS. Not"
  " needed where JAX finds the processes by itself: on TPU pods, with Slurm,"
  " Open MPI 4 and, where mpi4py is installed, any other MPI.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes",
  None,
  "Several hosts: processes of the run, or $JAX_NUM_PROCESSES. 1: this process"
  " alone, wherever it runs.",
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Several hosts: number from 0, or $JAX_PROCESS_ID."
)
_INITIALIZATION_TIMEOUT = flags.DEFINE_integer(
  "initialization_timeout",
  300,
  "Several hosts: seconds in which all processes must have started.",
  lower_bound=1,
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
  "heartbeat_timeout",
  60,
  "Several hosts: seconds after which a silent process counts as dead, which"
  " ends the others.",
  lower_bound=5,
)


def _train(config: ConfigDict, workdir: pathlib.Path, cluster: Any) -> None:
  from resnet_flax import train
  from resnet_flax.parallel import hosts
  from resnet_flax.run import signals

  with hosts.connected(
    cluster,
    timeout=_INITIALIZATION_TIMEOUT.value,
    heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
  ):
    stops = signals.StopSignals(exits=True)
    records = train.train_and_evaluate(config, workdir, signals=stops)
    if hosts.is_first():
      _print_results(config, records)


def _print_results(config: ConfigDict, records: list[dict[str, Any]]) -> None:
  from resnet_flax.run import metrics

  _print_scores(records[-1], "test_")
  monitor = config.checkpoint.monitor
  best_records = metrics.best_records(records, monitor)
  for seed, best in enumerate(best_records, config.seed):
    by = metrics.monitored(best, monitor)
    split = "validation" if by.startswith("val_") else "test"
    chosen = f"by {split} {monitor} {best[by]:.4f}"
    text = (
      f"Best epoch: {best['epoch']} (0-based), test accuracy"
      f" {best['test_accuracy']:.4f}, chosen"
      f" {'on the test split' if by == 'test_accuracy' else chosen}"
    )
    print(f"Seed {seed}: {text}" if config.num_seeds > 1 else text)


def _print_scores(scores: dict[str, Any], prefix: str = "") -> None:
  """Prints loss and accuracy; of several seeds also what goes with them."""
  for metric in ("loss", "accuracy"):
    text = f"Test {metric}: {scores[prefix + metric]:.4f}"
    if f"{prefix}{metric}_std" in scores:
      text += f" ± {scores[f'{prefix}{metric}_std']:.4f}, ensemble"
      text += f" {scores[f'{prefix}ensemble_{metric}']:.4f}"
    print(text)


def _evaluate(config: ConfigDict | None, workdir: pathlib.Path) -> None:
  from resnet_flax.run import load, signals

  with signals.StopSignals(exits=True):
    scores = load.evaluate_workdir(workdir, _CHECKPOINT.value, config=config)
  for each in scores.get("seeds", [scores]):
    epoch = each.get("epoch")
    when = "before training" if epoch is None else f"epoch {epoch} (0-based)"
    text = f"Checkpoint: {_CHECKPOINT.value}, step {each['step']}, {when}"
    if "seed" in each:
      text = f"Seed {each['seed']}: {text}, test accuracy"
      text += f" {each['accuracy']:.4f}"
    print(text)
  _print_scores(scores)


def _run(argv: list[str]) -> None:
  command_line.set_up()
  from resnet_flax.parallel import hosts

  mode, workdir = _MODE.value, process.WORKDIR.value
  if mode == "eval" and not workdir:
    raise errors.ConfigError("--mode=eval needs --workdir=DIR, a run's folder.")
  config = None
  if mode != "eval" or command_line.has_config():
    config, default_workdir = command_line.config_and_workdir()
    workdir = workdir or default_workdir
  cluster = hosts.find_cluster(
    _COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  )
  if mode == "train":
    _train(config, pathlib.Path(workdir), cluster)
  elif cluster:
    raise errors.ConfigError(
      f"--mode={mode} runs in one process, but num_processes is"
      f" {cluster.num_processes}. Start it once; --num_processes=1 makes a"
      " process of a cluster work alone."
    )
  elif mode == "eval":
    _evaluate(config, pathlib.Path(workdir))
  else:
    from resnet_flax.tools import summary

    print(summary.summarize(config), flush=True)


def run() -> None:
  """Runs the command line; mistakes and signals end in one line."""
  process.run(_run)


if __name__ == "__main__":
  process.use_huge_pages()
  run()
