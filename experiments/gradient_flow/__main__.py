"""Measures signal and gradient in every layer of networks of several depths.

  python -m experiments.gradient_flow
    [--families=plain,highway,resnet_v1] [--depths=20,56]
    [--init_depths=110,326] [--batch_norm=true,false] [--seeds=5]
    [--batch_size=32] [--measure_at=0,1,4,16,64,256]
    [--out=experiments/gradient_flow/results.jsonl]

Every network's record is written as soon as it is measured. The same command
measures the missing networks; other networks with the same --out are added.
`plot` takes only one number of seeds and one batch size.
"""

import json
import pathlib
import time

import jax

from experiments.gradient_flow import measurement
from experiments.tools import flag_types, records as records_lib
from resnet_flax.models import registry
from resnet_flax.run import (
  environment,
  errors,
  files as files_lib,
  huge_pages,
  process,
  surroundings,
)

_OUT = pathlib.Path("experiments/gradient_flow/results.jsonl")
_NORMS = {"true,false": [True, False], "true": [True], "false": [False]}


def main(argv: list[str]) -> None:
  """Measures the networks that --out lacks."""
  parser = process.Parser("python -m experiments.gradient_flow")
  add, integers = parser.add_argument, flag_types.integers
  families = flag_types.names(registry.MODELS)
  add("--families", type=families, default="plain,highway,resnet_v1")
  add("--depths", type=integers, default="20,56", help="trained")
  add("--init_depths", type=integers, default="110,326", help="untrained")
  add("--batch_norm", choices=_NORMS, default="true,false")
  add("--seeds", type=int, default=5, help="networks of each kind")
  add("--batch_size", type=int, default=32)
  add("--measure_at", type=integers, default="0,1,4,16,64,256", help="steps")
  add("--out", type=pathlib.Path, default=_OUT)
  flags = parser.parse_args(argv[1:])
  if not flags.measure_at or min(flags.measure_at) < 0:
    parser.error("--measure_at must have numbers of at least 0, such as 0,1")
  surroundings.set_up()
  cells = measurement.cells(
    flags.families,
    flags.depths,
    flags.init_depths,
    _NORMS[flags.batch_norm],
    flags.seeds,
    flags.batch_size,
    flags.measure_at,
  )
  records = measurement.read(flags.out)
  path = flags.out.with_suffix(".environment.json")
  now = environment.describe(jax.devices())
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    files_lib.write_json(path, now)
  elif changes := errors.differences(json.loads(path.read_text()), now):
    print(
      f"warning: this environment differs from {path}: {'; '.join(changes)}",
      flush=True,
    )
  for cell in measurement.missing(cells, records):
    started = time.perf_counter()
    measured = measurement.measure(cell.config(), cell.measure_at)
    # The next network cannot use this one's compiled programs.
    jax.clear_caches()
    seconds = round(time.perf_counter() - started, 1)
    records.append({"cell": cell.settings, "seconds": seconds, **measured})
    records_lib.write(flags.out, records)
    norm = "with" if cell.batch_norm else "without"
    print(
      f"{cell.family} {cell.depth} {norm} batch norm: {seconds} s", flush=True
    )


if __name__ == "__main__":
  huge_pages.use()
  process.run(main)
