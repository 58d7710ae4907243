"""Evaluates trained networks on a plane of their weights, and draws it.

  python -m experiments.loss_surface WORKDIR WORKDIR [--points=21]
    [--extent=0.5] [--examples=1000] [--seed=0] [--out=experiments/loss_surface]

Writes results.jsonl after each row of a grid; the same command again resumes.
Without a WORKDIR the command only draws the records of results.jsonl.
"""

import pathlib

from experiments.loss_surface import plot, surface
from experiments.tools import markdown, records as records_lib
from resnet_flax.run import errors, huge_pages, process, surroundings

COMMAND = "python -m experiments.loss_surface"


def main(argv: list[str]) -> None:
  """Writes results.jsonl, surface.png and the result in README.md."""
  parser = process.Parser(COMMAND, description=__doc__.split("\n")[0])
  add = parser.add_argument
  add("workdirs", metavar="WORKDIR", nargs="*", type=pathlib.Path)
  add("--points", type=int, default=21, help="along each axis, odd")
  add("--extent", type=float, default=0.5, help="length of an axis from 0")
  add("--examples", type=int, default=1000, help="training images")
  add("--seed", type=int, default=0, help="draws the directions")
  add("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
  plane = vars(parser.parse_args(argv[1:]))
  workdirs, out = plane.pop("workdirs"), plane.pop("out")
  if plane["points"] < 3 or plane["points"] % 2 == 0:
    parser.error(f"--points={plane['points']} must be odd and at least 3")
  if plane["extent"] <= 0 or plane["examples"] < 1 or plane["seed"] < 0:
    parser.error("--extent and --examples must be positive, --seed at least 0")
  path = out / "results.jsonl"
  if workdirs:
    for record in records_lib.read(path, "of"):
      if differing := errors.differences(record["of"]["plane"], plane):
        parser.error(
          f"{path} has another plane, which differs in {', '.join(differing)}."
          " Pass another --out, or the same values"
        )
    surroundings.set_up()
    # All workdirs are checked before the first one's long evaluation.
    runs = [surface.open_run(workdir, plane) for workdir in workdirs]
    out.mkdir(parents=True, exist_ok=True)
    for record, score in runs:
      surface.measure(record, score, path)
  complete = [
    record
    for record in records_lib.read(path, "of")
    if len(record["loss"]) == record["of"]["plane"]["points"]
  ]
  result = plot.table(complete)
  print(result)
  if complete:
    plot.draw(complete).savefig(out / "surface.png", dpi=110)
  if (out / "README.md").exists():
    markdown.update(out / "README.md", "surface", COMMAND, result)


if __name__ == "__main__":
  huge_pages.use()
  process.run(main)
