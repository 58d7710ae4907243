"""Measures signal and gradient in every layer of networks of several depths.

  python -m experiments.gradient_flow
    [--families=plain,highway,resnet_v1] [--depths=20,56]
    [--init_depths=110,326] [--batch_norm=true,false] [--seeds=5]
    [--batch_size=32] [--measure_at=0,1,4,16,64,256]
    [--out=experiments/gradient_flow/results.jsonl]

Every network is written as soon as it is measured. The same command again goes
on with those that are missing; another one with the same --out adds its own.
"""

import json
import pathlib
import sys
import time

import jax
from absl import app, flags

from experiments.gradient_flow import measurement
from resnet_flax.run import (
  environment,
  errors,
  files as files_lib,
  huge_pages,
  surroundings,
)

_FAMILIES = flags.DEFINE_list(
  "families",
  ["plain", "highway", "resnet_v1"],
  "Values of model.name.",
)
_DEPTHS = flags.DEFINE_list("depths", ["20", "56"], "Depths that are trained.")
_INIT_DEPTHS = flags.DEFINE_list(
  "init_depths",
  ["110", "326"],
  "Depths that are measured at initialisation only.",
)
_BATCH_NORM = flags.DEFINE_list(
  "batch_norm", ["true", "false"], "Whether networks have batch norm."
)
_SEEDS = flags.DEFINE_integer(
  "seeds", 5, "Networks of each kind, of seeds 0, 1, ...", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images of a step.")
_MEASURE_AT = flags.DEFINE_list(
  "measure_at",
  ["0", "1", "4", "16", "64", "256"],
  "Numbers of steps done; 0 is initialisation, the last ends training.",
)
_OUT = flags.DEFINE_string(
  "out",
  "experiments/gradient_flow/results.jsonl",
  "Raw figures, a line for each network.",
)


def _integers(flag: flags.FlagHolder) -> list[int]:
  try:
    values = [int(text) for text in flag.value]
  except ValueError:
    values = [-1]
  if any(value < 0 for value in values):
    raise errors.ConfigError(
      f"--{flag.name}={','.join(flag.value)} is no list of integers from 0 on;"
      " pass numbers such as 0,20."
    )
  return values


def _wanted() -> list[measurement.Cell]:
  if unknown := set(_BATCH_NORM.value) - {"true", "false"}:
    raise errors.unknown_name("--batch_norm", min(unknown), ["true", "false"])
  measure_at = _integers(_MEASURE_AT)
  if not measure_at:
    raise errors.ConfigError(
      "--measure_at is empty; pass at least one number, such as 0."
    )
  return measurement.cells(
    _FAMILIES.value,
    _integers(_DEPTHS),
    _integers(_INIT_DEPTHS),
    [text == "true" for text in _BATCH_NORM.value],
    _SEEDS.value,
    _BATCH_SIZE.value,
    measure_at,
  )


def _record_environment(out: pathlib.Path) -> None:
  path = out.with_suffix(".environment.json")
  now = environment.describe(jax.devices())
  if not path.exists():
    out.parent.mkdir(parents=True, exist_ok=True)
    files_lib.write_json(path, now)
  elif changes := errors.differences(json.loads(path.read_text()), now):
    print(f"warning: other than in {path}: {'; '.join(changes)}", flush=True)


def _run() -> None:
  surroundings.set_up()
  out = pathlib.Path(_OUT.value)
  wanted = _wanted()
  records = measurement.read(out)
  _record_environment(out)
  for cell in measurement.missing(wanted, records):
    started = time.perf_counter()
    measured = measurement.measure(cell.config(), cell.measure_at)
    # The programs of one network are of no use to the next.
    jax.clear_caches()
    records.append(
      {
        "cell": cell.settings,
        "seconds": round(time.perf_counter() - started, 1),
        **measured,
      }
    )
    measurement.write(out, records)
    norm = "with" if cell.batch_norm else "without"
    print(
      f"{cell.family} {cell.depth} {norm} batch norm:"
      f" {records[-1]['seconds']} s",
      flush=True,
    )


def main(argv: list[str]) -> None:
  """Measures what is missing; mistakes end in one line."""
  del argv
  try:
    _run()
  except errors.UserError as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  huge_pages.use()
  app.run(main)
