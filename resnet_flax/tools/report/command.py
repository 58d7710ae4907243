"""Writes a report of runs: a page with figures and tables, and their files."""

from resnet_flax.run import errors, process, surroundings


def main(argv: list[str]) -> None:
  """Runs the command line."""
  parser = process.Parser("python -m resnet_flax.report", description=__doc__)
  add = parser.add_argument
  what = "workdir, or folder of workdirs"
  add("folders", nargs="+", metavar="FOLDER", help=what)
  add("--out", required=True, help="new or old folder; its other files stay")
  add(
    "--checkpoints",
    choices=["best", "each", "none"],
    default="best",
    help="groups whose best checkpoint is scored on the test images, for the"
    " accuracy of each class, a confusion matrix and mistakes. best: the best"
    " group of each data set. each: all groups. none: no group",
  )
  args = parser.parse_intermixed_args(argv[1:])
  surroundings.set_up()
  from resnet_flax.run import signals

  with errors.extra("report", "a report"):
    from resnet_flax.tools.report import report
  # A signal first removes half-written files, then ends the process.
  with signals.StopSignals():
    made = report.make(args.folders, args.out, args.checkpoints)
  surroundings.show(f"Runs: {made.num_runs}\nGroups: {made.num_groups}")
  surroundings.show(f"Page: {made.page}")
