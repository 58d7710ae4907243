"""The command line: flags and what is printed of them, nothing else.

python -m resnet_flax.main --config=configs/v1_depth20.py [--workdir=DIR]
  [--mode=train|eval|summary] [--config.model.depth=56 ...]
"""

import pathlib
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from resnet_flax.run import command_line, errors, process

# --help shows these, too.
flags.adopt_module_key_flags(process)
flags.adopt_module_key_flags(command_line)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "eval", "summary"],
  "train: train, or go on training. eval: score a checkpoint of --workdir on"
  " the test split; needs no --config. summary: print the network, optimizer"
  " and schedule.",
)
_CHECKPOINT = flags.DEFINE_enum(
  "checkpoint",
  "best",
  ["best", "latest"],
  "Which checkpoint --mode=eval takes.",
)


_COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address",
  None,
  "Several hosts: HOST:PORT of process 0; by default $JAX_COORDINATOR_ADDRESS."
  " Not needed where JAX finds the processes by itself: on TPU pods, with"
  " Slurm, Open MPI 4 and, where mpi4py is installed, any other MPI.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes",
  None,
  "Several hosts: processes of the run; by default $JAX_NUM_PROCESSES. 1: this"
  " process alone, wherever it runs.",
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id",
  None,
  "Several hosts: which one this is, from 0; by default $JAX_PROCESS_ID.",
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
  "Several hosts: seconds after which a process that is not heard of counts as"
  " dead, which ends the others.",
  lower_bound=5,
)


def _find_cluster() -> Any:
  from resnet_flax.parallel import hosts as distributed

  return distributed.find_cluster(
    _COORDINATOR_ADDRESS.value,
    _NUM_PROCESSES.value,
    _PROCESS_ID.value,
  )


def _train(config: ConfigDict, workdir: pathlib.Path) -> None:
  from resnet_flax import train
  from resnet_flax.parallel import hosts as distributed
  from resnet_flax.run import signals

  with distributed.connected(
    _find_cluster(),
    timeout=_INITIALIZATION_TIMEOUT.value,
    heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
  ):
    records = train.train_and_evaluate(
      config, workdir, signals=signals.StopSignals(exits=True)
    )
    if distributed.is_first():
      _print_results(config, records)


def _print_results(config: ConfigDict, records: list[dict[str, Any]]) -> None:
  from resnet_flax.run import metrics

  monitor = config.checkpoint.monitor
  _print_scores(
    {
      key.removeprefix("test_"): value
      for key, value in records[-1].items()
      if key.startswith("test_")
    }
  )
  for seed, best in enumerate(
    metrics.best_records(records, monitor), config.seed
  ):
    text = f"Best epoch: {best['epoch']} (0-based), test accuracy"
    text += f" {best['test_accuracy']:.4f}, chosen "
    chosen_by = metrics.monitored(best, monitor)
    if chosen_by == "test_accuracy":
      text += "on the test split"
    else:
      split = {"val": "validation", "test": "test"}[chosen_by.partition("_")[0]]
      text += f"by {split} {monitor} {best[chosen_by]:.4f}"
    print(f"Seed {seed}: {text}" if config.num_seeds > 1 else text)


def _print_scores(scores: dict[str, Any]) -> None:
  """Prints loss and accuracy; of several seeds also what goes with them."""
  for metric in ("loss", "accuracy"):
    text = f"Test {metric}: {scores[metric]:.4f}"
    if f"{metric}_std" in scores:
      text += f" ± {scores[f'{metric}_std']:.4f}, ensemble"
      text += f" {scores[f'ensemble_{metric}']:.4f}"
    print(text)


def _evaluate(config: ConfigDict | None, workdir: pathlib.Path) -> None:
  from resnet_flax.run import load as inference, signals

  with signals.StopSignals(exits=True):
    scores = inference.evaluate_workdir(
      workdir, _CHECKPOINT.value, config=config
    )
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
  if _MODE.value != "train" and (cluster := _find_cluster()):
    raise errors.ConfigError(
      f"--mode={_MODE.value} runs in one process, but num_processes is"
      f" {cluster.num_processes}. Start it once; --num_processes=1 makes a"
      " process of a cluster work alone."
    )
  if _MODE.value == "eval":
    if not process.WORKDIR.value:
      raise errors.ConfigError(
        "--mode=eval needs --workdir=DIR, a run's folder."
      )
    config = None
    if command_line.has_config():
      config, _ = command_line.config_and_workdir()
    _evaluate(config, pathlib.Path(process.WORKDIR.value))
    return
  config, default_workdir = command_line.config_and_workdir()
  if _MODE.value == "summary":
    from resnet_flax.tools import summary

    print(summary.summarize(config), flush=True)
    return
  _train(config, pathlib.Path(process.WORKDIR.value or default_workdir))


def run() -> None:
  """Runs the command line; mistakes and signals end in one line."""
  process.run(_run)


if __name__ == "__main__":
  process.use_huge_pages()
  run()
