"""The command line: flags and what is printed of them, nothing else.

python -m resnet_flax.main --config=configs/v1_depth20.py [--workdir=DIR]
  [--mode=train|eval|summary] [--config.model.depth=56 ...]
"""

import pathlib

from absl import flags
from ml_collections import ConfigDict

from resnet_flax import errors, huge_pages, program

# For --helpshort, which shows a program's own.
flags.adopt_module_key_flags(program)
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


def _train(config: ConfigDict, workdir: pathlib.Path) -> None:
  from resnet_flax import interruption, metrics, train

  records = train.train_and_evaluate(
    config, workdir, signals=interruption.StopSignals(exits=True)
  )
  monitor = config.checkpoint.monitor
  last, best = records[-1], metrics.best_record(records, monitor)
  print(f"Test loss: {last['test_loss']:.4f}")
  print(f"Test accuracy: {last['test_accuracy']:.4f}")
  text = f"Best epoch: {best['epoch']} (0-based), test accuracy"
  text += f" {best['test_accuracy']:.4f}, chosen "
  chosen_by = metrics.monitored(best, monitor)
  if chosen_by == "test_accuracy":
    text += "on the test split"
  else:
    split = {"val": "validation", "test": "test"}[chosen_by.partition("_")[0]]
    text += f"by {split} {monitor} {best[chosen_by]:.4f}"
  print(text)


def _evaluate(config: ConfigDict | None, workdir: pathlib.Path) -> None:
  from resnet_flax import inference, interruption

  with interruption.StopSignals(exits=True):
    scores = inference.evaluate_workdir(
      workdir, _CHECKPOINT.value, config=config
    )
  epoch = scores.get("epoch")
  when = "before training" if epoch is None else f"epoch {epoch} (0-based)"
  print(f"Checkpoint: {_CHECKPOINT.value}, step {scores['step']}, {when}")
  print(f"Test loss: {scores['loss']:.4f}")
  print(f"Test accuracy: {scores['accuracy']:.4f}")


def _run(argv: list[str]) -> None:
  from resnet_flax import command_line

  command_line.set_up()
  if _MODE.value == "eval":
    if not program.WORKDIR.value:
      raise errors.ConfigError(
        "--mode=eval needs --workdir=DIR, a run's folder."
      )
    config = None
    if command_line.has_config():
      config, _ = command_line.config_and_workdir()
    _evaluate(config, pathlib.Path(program.WORKDIR.value))
    return
  config, default_workdir = command_line.config_and_workdir()
  if _MODE.value == "summary":
    from resnet_flax import summary

    print(summary.summarize(config), flush=True)
    return
  _train(config, pathlib.Path(program.WORKDIR.value or default_workdir))


def run() -> None:
  """Runs the command line; mistakes and signals end in one line."""
  program.run(_run)


if __name__ == "__main__":
  huge_pages.use_huge_pages()
  run()
