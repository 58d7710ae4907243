"""Writes the README's tables from the records.

python -m experiments.tools.tpu_compile.table
"""

import pathlib
from collections.abc import Iterator, Sequence

from experiments.tools import markdown
from experiments.tools.records import Record
from experiments.tools.tpu_compile import compilation, hlo, records

_FOLDER = pathlib.Path(__file__).parent
README = _FOLDER / "README.md"
RESULTS = _FOLDER / "results.jsonl"
CUDA_RESULTS = _FOLDER / "cuda.jsonl"

_COMMAND = "python -m experiments.tools.tpu_compile.table"
# The tables have columns for these keys.
_SHOWN = (
  *("batch_size", "eval_batch_size"),
  *("model.name", "model.depth", "model.dtype"),
)


def _title(record: Record) -> list[str]:
  """Names the network with its overrides, its dtype and the devices."""
  config = record["config"]
  words = [f"{config['name']} {config['depth']}"]
  if config["input_size"]:
    words.append(f"{config['input_size']}x{config['input_size']}")
  for argument in record["arguments"]:
    _, _, override = argument.partition("--config.")
    if override and override.partition("=")[0] not in _SHOWN:
      words.append(override.removeprefix("model."))
  return [", ".join(words), config["dtype"], record["topology"]]


def _steps(
  results: Sequence[Record],
) -> Iterator[tuple[Record, Record, list[str]]]:
  """Yields (record, step, first cells) for both steps of each record."""
  for record in results:
    for name in compilation.STEPS:
      yield record, record[name], [*_title(record), name]


def steps_table(results: Sequence[Record]) -> str:
  """Makes the table of compilation, memory and the roofline."""
  header = (
    *("network", "dtype", "topology", "step", "images/device", "compile s"),
    *("MB/device", "of HBM", "temporary MB", "GFLOP", "GFLOP of layers"),
    *("GB moved", "roofline ms", "bound by"),
  )
  rows = []
  for record, step, title in _steps(results):
    memory, roofline = step["memory"], step["roofline"]
    memory_bound = roofline["memory_seconds"] > roofline["compute_seconds"]
    # XLA's cost analysis counts the body of a loop over blocks once.
    arguments = [each.lower() for each in record["arguments"]]
    at_least = "≥ " if "--config.model.scan=true" in arguments else ""
    rows.append(
      [
        *title,
        str(step["images_per_device"]),
        f"{step['compile_seconds']:.0f}",
        f"{memory['total'] / 1e6:.1f}",
        f"{memory['total'] / record['memory_bytes']:.2%}",
        f"{memory['temporary'] / 1e6:.1f}",
        f"{at_least}{step['flops'] / 1e9:.2f}",
        f"{step['model_flops'] / 1e9:.2f}",
        f"{at_least}{step['bytes_accessed'] / 1e9:.3f}",
        f"{at_least}{roofline['seconds'] * 1e3:.3f}",
        # A lower bound of the traffic cannot show that arithmetic takes longer.
        "memory" if memory_bound else "unknown" if at_least else "arithmetic",
      ]
    )
  return markdown.table(header, rows)


def program_table(results: Sequence[Record]) -> str:
  """Makes the table of the programs' operations."""
  header = (
    *("network", "dtype", "topology", "step", "collectives", "kB in them"),
    *("host transfers", "custom calls", "convolutions", "loops", "padding"),
    *("state overwritten", "MB of it"),
  )
  rows = []
  for _, step, title in _steps(results):
    arrays = step.get("state_arrays")
    rows.append(
      [
        *title,
        _collectives(step) or "none",
        f"{step['collective_bytes'] / 1e3:.1f}",
        str(len(step["host_transfers"])),
        ", ".join(step["custom_calls"]) or "none",
        str(step["convolutions"]),
        str(step["loops"]),
        f"{step['convolution_padding']:.2f}",
        f"{step['aliased_arrays']} of {arrays} arrays" if arrays else "",
        f"{step['memory']['aliased'] / 1e6:.2f}" if arrays else "",
      ]
    )
  return markdown.table(header, rows)


def cuda_table(results: Sequence[Record]) -> str:
  """Makes the table of the programs that are lowered for GPUs."""
  header = (
    *("network", "dtype", "devices", "step", "convolutions", "dots", "loops"),
    "custom calls",
  )
  rows = [
    [
      *title,
      *(str(step[key]) for key in ("convolutions", "dots", "loops")),
      ", ".join(step["custom_calls"]) or "none",
    ]
    for _, step, title in _steps(results)
  ]
  return markdown.table(header, rows)


def _collectives(step: Record) -> str:
  counts = {
    kind: sum(e["count"] for e in step["collectives"] if e["kind"] == kind)
    for kind in hlo.COLLECTIVES
  }
  return ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)


def with_tables(text: str) -> str:
  """Inserts the tables of the committed records into the README's text."""
  results = records.read(RESULTS)
  tables = {
    "steps": steps_table(results),
    "programs": program_table(results),
    "gpu": cuda_table(records.read(CUDA_RESULTS)),
  }
  for name, table in tables.items():
    text = markdown.replace(text, name, _COMMAND, table)
  return text


def main() -> None:
  """Replaces the tables between their markers."""
  README.write_text(with_tables(README.read_text()))


if __name__ == "__main__":
  main()
