"""Makes tables and a figure from the benchmark's results.

  python -m experiments.throughput.report [--out=DIR]

The command reads DIR/results.json, prints Markdown tables and writes
DIR/throughput.png. The results may come from an interrupted run. Tables of
the published folder, the default, also go into README.md and docs/results.md.
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

from experiments.throughput import flops
from experiments.throughput.programs import PROGRAMS
from experiments.tools import markdown

Results = dict[str, Any]
Setting = tuple[int, int]

_FOLDER = pathlib.Path(__file__).parent
PUBLISHED = _FOLDER / "comparison"
COMMAND = "python -m experiments.throughput.report"
_MATMUL_FLOPS = 2 * 1024**3


def settings(results: Results) -> list[Setting]:
  """Lists the measured (depth, batch size) pairs, sorted."""
  return sorted({(w["depth"], w["batch_size"]) for w in results["windows"]})


def programs(results: Results) -> list[str]:
  """Lists the measured programs, ours first."""
  measured = {window["program"] for window in results["windows"]}
  order = sorted(PROGRAMS, key=lambda name: not name.startswith("ours"))
  return [program for program in order if program in measured]


def by_round(
  results: Results, setting: Setting, program: str, kind: str
) -> dict[int, float]:
  """Steps per second in each round that measured this kind of window."""
  return {
    w["round"]: w["steps"] / w["seconds"]
    for w in results["windows"]
    if (w["depth"], w["batch_size"]) == setting
    and (w["program"], w["kind"]) == (program, kind)
  }


def ratios(above: dict[int, float], below: dict[int, float]) -> list[float]:
  """Divides round by round, for the rounds that have both numbers."""
  return [above[k] / below[k] for k in sorted(above.keys() & below.keys())]


def compared(
  results: Results, setting: Setting, program: str, kind: str
) -> str:
  """Formats our speed divided by a program's of the same dtype, by round."""
  ours = PROGRAMS[program].ours
  if program == ours:
    return "1"
  speeds = (by_round(results, setting, each, kind) for each in (ours, program))
  return markdown.spread(ratios(*speeds), ".2f")


def tables(results: Results) -> dict[str, str]:
  """Makes Markdown tables, by the name of their markers."""
  return {
    "setting": _setting(results),
    "training": _speeds(results, "train", flops.training),
    "inference": _speeds(results, "infer", flops.inference),
    "pipeline": _pipeline(results),
    "programs": _programs(results),
  }


def _speeds(
  results: Results, kind: str, operations: Callable[[int], int]
) -> str:
  rows = []
  for setting in settings(results):
    depth, batch_size = setting
    for program in programs(results):
      steps = by_round(results, setting, program, kind).values()
      if steps:
        speeds = [batch_size * each for each in steps]
        gflops = [each * operations(depth) / 1e9 for each in speeds]
        rows.append(
          [
            *setting,
            PROGRAMS[program].title,
            markdown.spread(speeds, ".0f"),
            compared(results, setting, program, kind),
            markdown.spread(gflops, ".0f"),
          ]
        )
  titles = ("depth", "batch", "program", "images/s", "ours ÷ it", "GFLOP/s")
  return markdown.table(titles, rows)


def _pipeline(results: Results) -> str:
  rows = []
  for setting in settings(results):
    real, resident = (
      by_round(results, setting, "ours_data", kind)
      for kind in ("train", "resident")
    )
    cost = [ratio - 1 for ratio in ratios(resident, real)]
    speeds = (
      markdown.spread([setting[1] * each for each in steps.values()], ".0f")
      for steps in (real, resident)
    )
    rows.append([*setting, *speeds, markdown.spread(cost, ".1%")])
  titles = ("real data, images/s", "resident batch, images/s", "cost")
  return markdown.table(("depth", "batch", *titles), rows)


def _programs(results: Results) -> str:
  rows = []
  for worker in results["programs"]:
    cells = [worker["depth"], worker["batch_size"]]
    cells.append(PROGRAMS[worker["program"]].title)
    if "left_out" in worker:
      # results.json has the reason, which is long.
      rows.append([*cells, "left out", *[""] * 5])
      continue
    rows.append(
      [
        *(*cells, f"{worker['build_seconds']:.1f}"),
        f"{worker['peak_megabytes']:.0f}",
        f"{worker['huge_page_megabytes'] or 0:.0f}",
        *(f"{worker['parameters']:,}", worker["threads"]),
        ", ".join(" ".join(each) for each in worker["libraries"].items()),
      ]
    )
  return markdown.table(
    [
      *("depth", "batch", "program", "build and first step, s"),
      *("peak memory, MB", "in huge pages, MB", "parameters", "threads"),
      "libraries",
    ],
    rows,
  )


def _setting(results: Results) -> str:
  """Lists the date, commit, machine and load of the measurements."""
  host, windows = results["environment"], results["windows"]
  rounds = len({window["round"] for window in windows})
  trained = [w["seconds"] for w in windows if w["kind"] == "train"]
  waiting = max(
    w["waiting_cpu_seconds"] / w["seconds"] for w in windows if w["steps"]
  )
  matmul = [
    _MATMUL_FLOPS * w["steps"] / w["seconds"] / 1e9
    for w in windows
    if w["kind"] == "matmul"
  ]
  return "\n".join(
    [
      f"- {results['date']}, commit {host['git_commit'][:7]}, n = {rounds}"
      f" rounds, training windows of {min(trained):.1f} to"
      f" {max(trained):.1f} s",
      f"- {host['cpu_model']} ({host['cpu_generation']}),"
      f" {results['settings']['threads']} threads, load average"
      f" {results['load_average'][0]:.1f} before the start",
      "- JAX's product of two 1024x1024 matrices:"
      f" {markdown.spread(matmul, '.0f')} GFLOP/s",
      f"- All waiting programs together used at most {waiting:.1%} of one"
      " core in any window",
    ]
  )


def summary(results: Results) -> str:
  """Makes the table in docs/results.md: ours divided by the others."""
  depth = settings(results)[0][0]
  pairs = [each for each in settings(results) if each[0] == depth]
  return markdown.table(
    ["program", *(f"batch {batch_size}" for _, batch_size in pairs)],
    (
      [
        PROGRAMS[program].title,
        *(compared(results, each, program, "train") for each in pairs),
      ]
      for program in programs(results)
      if not program.startswith("ours")
    ),
  )


def start_table(start: dict[str, Any]) -> str:
  """Formats the `start` of start.json as Markdown."""
  return markdown.spread_table(
    (
      f"command to {what}, {cache} compilation cache, s",
      [times[key] for times in start[cache]],
      ".2f",
    )
    for cache in ("cold", "warm")
    for key, what in (
      ("compiling", "compilation"),
      ("first_step", "first step"),
    )
  )


def draw(results: Results, path: pathlib.Path) -> None:
  """Draws medians as bars, and ranges from least to most as lines."""
  # Imported here, since measurements and tables do not need it.
  from matplotlib.figure import Figure

  groups = settings(results)
  names = programs(results)[::-1]
  size = 10, 0.8 + len(groups) * (0.8 + 0.22 * len(names))
  figure = Figure(figsize=size, layout="constrained")
  axes = figure.subplots(len(groups), 2, squeeze=False, sharey=True)
  for line, (depth, batch_size) in zip(axes, groups, strict=True):
    for axis, kind in zip(line, ("train", "infer"), strict=True):
      for place, program in enumerate(names):
        steps = by_round(results, (depth, batch_size), program, kind).values()
        if not steps:
          continue
        speeds = [batch_size * each for each in steps]
        median = statistics.median(speeds)
        # Colour and hatch, so that the figure is readable in grey.
        axis.barh(
          place,
          median,
          xerr=([median - min(speeds)], [max(speeds) - median]),
          capsize=2,
          color="#0072b2" if program.startswith("ours") else "#e69f00",
          hatch="//" if PROGRAMS[program].dtype == "bfloat16" else "",
          edgecolor="black",
          linewidth=0.6,
        )
      axis.set_title(
        f"{'training' if kind == 'train' else 'inference'},"
        f" ResNet-{depth}, batch {batch_size}"
      )
      axis.grid(axis="x", alpha=0.3)
      axis.set_axisbelow(True)
    line[0].set_yticks(range(len(names)), [PROGRAMS[n].title for n in names])
  for axis in axes[-1]:
    axis.set_xlabel("images per second: median and range of the rounds")
  figure.savefig(path, dpi=110)


def write(out: pathlib.Path) -> None:
  """Prints the tables of out/results.json and writes out/throughput.png.

  Tables of the published results go into the pages, too.
  """
  results = json.loads((out / "results.json").read_text())
  print("\n\n".join(tables(results).values()))
  draw(results, out / "throughput.png")
  if out.resolve() == PUBLISHED:
    for page, named_tables in pages(results).items():
      for name, table in named_tables.items():
        markdown.update(page, name, COMMAND, table)


def pages(results: Results) -> dict[pathlib.Path, dict[str, str]]:
  """The tables of each page, by the names of their markers."""
  docs = _FOLDER.parents[1] / "docs" / "results.md"
  shown = {"setting": _setting(results), "training": summary(results)}
  return {_FOLDER / "README.md": tables(results), docs: shown}


def main() -> None:
  """Makes the tables and the figure again."""
  parser = argparse.ArgumentParser(description="Remakes tables and figure.")
  parser.add_argument("--out", type=pathlib.Path, default=PUBLISHED)
  write(parser.parse_args().out)


if __name__ == "__main__":
  main()
