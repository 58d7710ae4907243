"""Trains residual networks, scores a checkpoint, or prints a summary.

python -m resnet_flax.main --config=configs/v1_depth20.py [--workdir=DIR]
  [--mode=train|eval|summary] [--config.model.depth=56 ...]
"""

from absl import flags

from resnet_flax.run import (
  command_line,
  errors,
  host_flags,
  huge_pages,
  process,
  surroundings,
)

# --help lists the flags that these modules define.
for module in (process, command_line, host_flags):
  flags.adopt_module_key_flags(module)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "eval", "summary"],
  "train: train, or resume training. eval: score a checkpoint of --workdir;"
  " needs no --config. summary: print the network, optimizer and schedule.",
)
_CHECKPOINT = flags.DEFINE_enum(
  "checkpoint", "best", ["best", "latest"], "Checkpoint for --mode=eval."
)
_WEIGHTS = flags.DEFINE_enum(
  *("weights", "raw", ["raw", "ema", "swa"]),
  "Weights for --mode=eval. raw: of the checkpoint's step. ema, swa: averages"
  " over the training so far.",
)
_SPLIT = flags.DEFINE_enum(
  "split", "test", ["train", "val", "test"], "Images for --mode=eval."
)


def _run(argv: list[str]) -> None:
  surroundings.set_up()
  from resnet_flax.parallel import hosts
  from resnet_flax.run import load, progress, signals

  eval_flags = (_CHECKPOINT, _WEIGHTS, _SPLIT)
  passed = [f"--{f.name}={f.value}" for f in eval_flags if f.present]
  if passed and _MODE.value != "eval":
    raise errors.ConfigError(
      f"{' and '.join(passed)} must come with --mode=eval."
      + " A run keeps an average of its weights with --config.ema.decay=0.999."
      * _WEIGHTS.present
    )
  # Scoring a workdir needs no --config: the workdir stores its own.
  mode, workdir = _MODE.value, process.WORKDIR.value
  config = None
  if mode != "eval" or not workdir or command_line.CONFIG.value:
    config, default_workdir = command_line.config_and_workdir()
    workdir = workdir or default_workdir
  connection = host_flags.connection(mode)

  if mode == "train":
    from resnet_flax import train

    with connection:
      stops = signals.StopSignals(exits=True)
      records = train.train_and_evaluate(config, workdir, signals=stops)
      if hosts.is_first():
        surroundings.show(progress.results(config, records))
        surroundings.show(progress.next_steps(config, workdir))
  elif mode == "eval":
    with signals.StopSignals(exits=True):
      choice = _CHECKPOINT.value, _WEIGHTS.value, _SPLIT.value
      scores = load.evaluate_workdir(workdir, *choice, config=config)
    surroundings.show(progress.evaluation(*choice, scores))
  else:
    from resnet_flax.tools import summary

    surroundings.show(summary.summarize(config))


def run() -> None:
  """Runs the command line; a mistake or a signal ends it with one line."""
  process.run(_run, command_line.parse_flags)


if __name__ == "__main__":
  huge_pages.use()
  run()
