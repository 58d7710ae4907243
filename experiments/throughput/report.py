"""Makes tables and a figure from the benchmark's results.

  python -m experiments.throughput.report --out=DIR

The command reads DIR/results.json, prints Markdown tables and writes
DIR/throughput.png. The results may come from an interrupted run.
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

from experiments.throughput import flops
from experiments.tools.timing import spread, spread_table

Measurement = dict[str, Any]
Results = dict[str, Any]
Setting = tuple[int, int]

_TITLES = {
  "ours": "resnet_flax",
  "plain": "plain Flax",
  "keras": "Keras (TensorFlow)",
  "torch": "PyTorch",
}
# Colours and hatches both differ, so that the figure is readable in grey.
_STYLES = {
  "ours": ("#0072b2", ""),
  "plain": ("#56b4e9", "//"),
  "keras": ("#e69f00", ".."),
  "torch": ("#d55e00", "xx"),
}


def settings(results: Results) -> list[Setting]:
  """Lists the measured (depth, batch size) pairs, sorted."""
  return sorted(
    {(m["depth"], m["batch_size"]) for m in results["measurements"]}
  )


def programs(results: Results) -> list[str]:
  """Lists the measured programs, ours first."""
  measured = {m["program"] for m in results["measurements"]}
  return [program for program in _TITLES if program in measured]


def by_round(
  results: Results,
  setting: Setting,
  program: str,
  value: Callable[[Measurement], float],
) -> dict[int, float]:
  """Returns one number for each round that measured a program at a setting.

  Args:
    results: as in results.json.
    setting: depth and batch size.
    program: short name of the program.
    value: takes the number from a measurement.
  """
  return {
    m["round"]: value(m)
    for m in results["measurements"]
    if (m["depth"], m["batch_size"]) == setting and m["program"] == program
  }


def ratios(above: dict[int, float], below: dict[int, float]) -> list[float]:
  """Divides round by round, for the rounds that have both numbers."""
  return [above[k] / below[k] for k in sorted(above.keys() & below.keys())]


def _train(m: Measurement) -> float:
  return m["train_images_per_second"]


def _inference(m: Measurement) -> float:
  return m["inference_images_per_second"]


def _train_gflops(m: Measurement) -> float:
  return _train(m) * flops.training(m["depth"]) / 1e9


def _share_of_matmul(m: Measurement) -> float:
  # One process measures both numbers, so the machine's drift cancels.
  return _train_gflops(m) / m["matmul_gflops"]


def tables(results: Results) -> str:
  """Makes Markdown tables of training, inference and costs."""
  return "\n\n".join(
    [
      _table(
        results,
        {
          "training, images/s": (_train, ".0f"),
          "resnet_flax ÷ it": (_train, None),
          "GFLOP/s": (_train_gflops, ".0f"),
          "of matmul": (_share_of_matmul, ".0%"),
        },
      ),
      _table(
        results,
        {
          "inference, images/s": (_inference, ".0f"),
          "resnet_flax ÷ it": (_inference, None),
        },
      ),
      _table(
        results,
        {
          "build and first step, s": (lambda m: m["compile_seconds"], ".1f"),
          "peak memory, MB": (lambda m: m["peak_megabytes"], ".0f"),
          "matmul, GFLOP/s": (lambda m: m["matmul_gflops"], ".0f"),
        },
      ),
      _versions(results),
    ]
  )


def _table(
  results: Results,
  columns: dict[str, tuple[Callable[[Measurement], float], str | None]],
) -> str:
  """Makes a row per setting and program; no format means ours divided by it."""
  lines = [
    "| " + " | ".join(["depth", "batch", "program", *columns]) + " |",
    "| " + " | ".join(["---"] * (3 + len(columns))) + " |",
  ]
  for setting in settings(results):
    for program in programs(results):
      cells = [*map(str, setting), _TITLES[program]]
      for value, form in columns.values():
        measured = by_round(results, setting, program, value)
        if form is not None:
          cells.append(spread(list(measured.values()), form))
        elif program == "ours":
          cells.append("1")
        else:
          ours = by_round(results, setting, "ours", value)
          cells.append(spread(ratios(ours, measured), ".2f"))
      lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _versions(results: Results) -> str:
  last = {m["program"]: m for m in results["measurements"]}
  return "\n".join(
    f"- {_TITLES[program]}: "
    + ", ".join(
      f"{name} {version}"
      for name, version in last[program]["libraries"].items()
    )
    + f"; Python {last[program]['python']}, {last[program]['threads']} threads"
    for program in programs(results)
  )


def pipeline_table(results: dict[str, Any]) -> str:
  """Formats the results of `input_pipeline` as Markdown."""
  steps, start = results["steps"], results["start"]
  costs = [
    resident / real - 1
    for resident, real in zip(steps["resident"], steps["real"], strict=True)
  ]
  return spread_table(
    [
      ("training on real data, images/s", steps["real"], ".1f"),
      ("one resident batch, images/s", steps["resident"], ".1f"),
      ("cost of the input pipeline, pair by pair", costs, ".1%"),
      *(
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
      ),
    ]
  )


def draw(results: Results, path: pathlib.Path) -> None:
  """Draws medians as bars, and the least and the most as lines.

  Args:
    results: as in results.json.
    path: path of the PNG file.
  """
  # Imported here, since measurements and tables do not need it.
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  groups, names = settings(results), programs(results)
  width = 0.8 / len(names)
  figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
  for axis, value, title in (
    (axes[0], _train, "training"),
    (axes[1], _inference, "inference"),
  ):
    for position, program in enumerate(names):
      colour, hatch = _STYLES[program]
      places, medians, below, above = [], [], [], []
      for group, setting in enumerate(groups):
        values = list(by_round(results, setting, program, value).values())
        if not values:
          continue
        median = statistics.median(values)
        places.append(group + (position - (len(names) - 1) / 2) * width)
        medians.append(median)
        below.append(median - min(values))
        above.append(max(values) - median)
      axis.bar(
        places,
        medians,
        width,
        yerr=(below, above),
        capsize=2,
        error_kw={"elinewidth": 1},
        color=colour,
        hatch=hatch,
        edgecolor="black",
        linewidth=0.6,
        label=_TITLES[program],
      )
    axis.set_xticks(
      range(len(groups)),
      [f"ResNet-{depth}\nbatch {batch}" for depth, batch in groups],
    )
    axis.set_title(title)
    axis.set_ylabel("images per second")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
  # The number of rounds differs between settings.
  rounds = sorted(
    {
      len(by_round(results, group, name, _train))
      for group in groups
      for name in names
    }
    - {0}
  )
  figure.suptitle(
    "ResNet v1 on a CPU, float32, one resident batch: median and range of"
    f" {' or '.join(map(str, rounds))} rounds"
  )
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside lower center", ncols=len(names), fontsize=9
  )
  figure.savefig(path, dpi=150)
  plt.close(figure)


def write(out: pathlib.Path) -> None:
  """Prints the tables of out/results.json and writes out/throughput.png."""
  results = json.loads((out / "results.json").read_text())
  print(tables(results))
  draw(results, out / "throughput.png")


def main() -> None:
  """Makes the tables and the figure again."""
  parser = argparse.ArgumentParser(description="Remakes tables and figure.")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  write(parser.parse_args().out)


if __name__ == "__main__":
  main()
