"""The command line: flags and what is printed of them, nothing else.

python -m resnet_flax.main --config=configs/v1_depth20.py [--workdir=DIR]
  [--mode=train|eval|summary] [--config.model.depth=56 ...]
"""

import os
import pathlib
import signal
import sys
from typing import NoReturn

from absl import app, flags
from ml_collections import ConfigDict

from resnet_flax import errors, huge_pages

_WORKDIR = flags.DEFINE_string(
  "workdir",
  "",
  "Folder of the run. By default runs/NAME, where NAME is made of the config"
  " file's name and the overrides.",
)
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
  from resnet_flax import inference

  scores = inference.evaluate_workdir(workdir, _CHECKPOINT.value, config=config)
  print(
    f"Checkpoint: {_CHECKPOINT.value}, step {scores['step']}, epoch"
    f" {scores['epoch']} (0-based)"
  )
  print(f"Test loss: {scores['loss']:.4f}")
  print(f"Test accuracy: {scores['accuracy']:.4f}")


def _run(argv: list[str]) -> None:
  from resnet_flax import command_line

  command_line.set_up()
  if _MODE.value == "eval":
    if not _WORKDIR.value:
      raise errors.ConfigError(
        "--mode=eval needs --workdir=DIR, a run's folder."
      )
    config = None
    if command_line.has_config():
      config, _ = command_line.config_and_workdir()
    _evaluate(config, pathlib.Path(_WORKDIR.value))
    return
  config, default_workdir = command_line.config_and_workdir()
  if _MODE.value == "summary":
    from resnet_flax import summary

    print(summary.summarize(config), flush=True)
    return
  _train(config, pathlib.Path(_WORKDIR.value or default_workdir))


def run() -> None:
  """Runs the command line; mistakes and Ctrl-C end in one line."""
  try:
    from resnet_flax import command_line

    app.run(_run, flags_parser=command_line.parse_flags)
  except errors.UserError as error:
    _leave_at_once(f"error: {error}", error.exit_code)
  except KeyboardInterrupt as error:
    number = signal.Signals(getattr(error, "number", signal.SIGINT))
    text = f"error: stopped by {number.name}; nothing new was saved."
    _leave_at_once(text, 128 + number)
  except BrokenPipeError:
    # Whoever reads our output, such as `head`, has seen enough.
    os._exit(0)


def _leave_at_once(text: str, exit_code: int) -> NoReturn:
  """Ends the process without waiting for the threads of libraries.

  XLA goes on compiling in threads of its own, and crashes if the interpreter
  is taken away from under it; Orbax's wait for minutes for a save that has
  failed. What was to be saved has been saved.
  """
  print(text, file=sys.stderr, flush=True)
  os._exit(exit_code)


if __name__ == "__main__":
  huge_pages.use_huge_pages()
  run()
