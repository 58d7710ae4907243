"""Measures the cost of depth, plain, rematerialised and looped.

  python -m experiments.depth_cost [--out=FILE.json] [--name=resnet_v1]
    [--depths=20,56,110] [--modes=plain,remat,scan,scan+remat]
    [--batch_size=32] [--steps=3]

Each depth and mode is measured in its own process, on one resident batch,
without a compilation cache. Nothing else should run meanwhile.
"""

import multiprocessing
from concurrent import futures

from experiments.depth_cost import measurement
from experiments.tools import flag_types, markdown
from resnet_flax.run import files as files_lib, huge_pages, process


def main(argv: list[str]) -> None:
  """Measures, prints each row of the table, and writes the raw figures."""
  parser = process.Parser("python -m experiments.depth_cost")
  add, modes = parser.add_argument, measurement.MODES
  add("--name", default="resnet_v1", help="the network's `model.name`")
  add("--depths", type=flag_types.integers, default="20,56,110")
  add("--modes", type=flag_types.names(modes), default=",".join(modes))
  add("--batch_size", type=flag_types.count, default=32)
  add("--steps", type=flag_types.count, default=3, help="timed steps")
  add("--out", type=flag_types.new_file, help="written after each process")
  flags = parser.parse_args(argv[1:])
  print(markdown.table(measurement.COLUMNS, []), flush=True)
  environments, results = [], []
  for depth in flags.depths:
    for mode in flags.modes:
      # Only the new process uses the devices, so it describes them, too.
      with futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
      ) as pool:
        result = pool.submit(
          measurement.measure,
          *(flags.name, depth, mode, flags.batch_size, flags.steps),
        ).result()
      environments.append(result.pop("environment"))
      results.append(result)
      print(measurement.row(result), flush=True)
      if flags.out:
        figures = {"environment": environments[0], "results": results}
        files_lib.write_json(flags.out, figures)


if __name__ == "__main__":
  huge_pages.use()
  process.run(main)
