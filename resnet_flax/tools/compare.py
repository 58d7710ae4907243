"""The command that compares two experiments; see `comparison.py`."""

from resnet_flax.run import process, surroundings


def main(argv: list[str]) -> None:
  """Runs the command line."""
  parser = process.Parser(
    "python -m resnet_flax.compare",
    description="Compares experiments A and B over seeds and over test images,"
    " with 95 % intervals, and lists how their configurations and environments"
    " differ.",
  )
  add = parser.add_argument
  add("a", nargs="+", metavar="A", help="workdir, or folder of workdirs")
  # A second --with adds to the first.
  add("--with", nargs="+", action="extend", required=True, dest="b")
  add(
    "--metric", default="accuracy", help="key of metrics.jsonl without 'test_'"
  )
  add("--which", default="best", choices=["best", "last"], help="epoch")
  formats = ["text", "markdown", "csv", "latex"]
  add("--format", default="text", choices=formats)
  add("--no-images", dest="images", action="store_false")
  args = parser.parse_args(argv[1:])
  surroundings.set_up()
  from resnet_flax.tools import comparison

  tables = comparison.compare(
    args.a, args.b, args.metric, args.which, images=args.images
  )
  texts = [getattr(table, f"to_{args.format}")() for table in tables]
  surroundings.show("\n".join(texts).removesuffix("\n"))
