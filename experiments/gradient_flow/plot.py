"""Draws what was measured, and writes the README's table.

python -m experiments.gradient_flow.plot
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.gradient_flow import measurement
from experiments.tools import markdown
from experiments.tools.records import Record

_FOLDER = pathlib.Path(__file__).parent
COMMAND = "python -m experiments.gradient_flow.plot"
# Readable in black and white: markers and dashes differ, not only colours.
_STYLES = {
  "plain": ("#000000", "x", ":"),
  "highway": ("#e69f00", "v", "-."),
  "resnet_v1": ("#0072b2", "s", "-"),
  "resnet_v2": ("#009e73", "^", (0, (5, 1))),
  "preact": ("#cc79a7", "D", "--"),
}
# Projections and gates are beside the layers that depth counts.
_BESIDE = ("shortcut_conv", "gate_conv")
_MARKERS = 8
_MANY_LAYERS = 200
_DATA = "CIFAR-10 (JPEG copy), batches of {batch_size}, {num_seeds} seeds"


def norms(record: Record, quantity: str, step: int) -> np.ndarray:
  """A quantity of the layers after `step` steps, float64[seeds, layers].

  Projections and gates are left out. A norm that was not finite is NaN.
  """
  counted = [
    place
    for place, name in enumerate(record["layers"])
    if name.rpartition("/")[2] not in _BESIDE
  ]
  rows = [
    measured[quantity]
    for seed in record["seeds"]
    for measured in seed["measured"]
    if measured["step"] == step
  ]
  return np.asarray(rows, np.float64)[:, counted]


def spread(record: Record, step: int) -> np.ndarray:
  """The largest gradient of the layers divided by the smallest, float64[seeds].

  NaN where a gradient is zero or not finite.
  """
  gradients = norms(record, "gradient", step)
  gradients[gradients == 0] = np.nan
  return gradients.max(axis=1) / gradients.min(axis=1)


def _panels(
  records: Sequence[Record],
  title: str,
  xlabel: str,
  ylabel: str,
  curve: Callable[[Record], tuple[Sequence[float], np.ndarray]],
) -> Figure:
  """A figure: with and without batch norm in rows, depths in columns.

  `curve` gives x, [N], and y, float64[seeds, N], of a record.
  """
  depths = sorted({record["cell"]["depth"] for record in records})
  forms = sorted({record["cell"]["batch_norm"] for record in records})[::-1]
  size = 2.6 * len(depths) + 1.5, 1.2 + 2.6 * len(forms)
  figure = Figure(figsize=size, layout="constrained")
  axes = figure.subplots(len(forms), len(depths), sharey="row", squeeze=False)
  for record in records:
    cell = record["cell"]
    style = _STYLES.get(cell["family"], ("#d55e00", "o", "-"))
    color, marker, line = style
    axis = axes[forms.index(cell["batch_norm"]), depths.index(cell["depth"])]
    x, y = curve(record)
    # Zero has no logarithm.
    y = np.ma.masked_invalid(np.where(y > 0, y, np.nan))
    axis.plot(
      x,
      np.exp(np.log(y).mean(axis=0)),
      color=color,
      linestyle=line,
      marker=marker,
      markersize=4,
      markevery=max(len(x) // _MARKERS, 1),
      # Curves of many layers zigzag, so that thick lines would fill a panel.
      linewidth=1.2 if len(x) < _MANY_LAYERS else 0.5,
      label=cell["family"],
    )
    axis.fill_between(
      x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.2, linewidth=0
    )
  for axis in axes.flat:
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
  for row, has_norm in enumerate(forms):
    form = "with" if has_norm else "without"
    axes[row, 0].set_ylabel(f"{ylabel}\n{form} batch norm")
  for column, depth in enumerate(depths):
    axes[0, column].set_title(f"depth {depth}")
    axes[-1, column].set_xlabel(xlabel)
  handles: dict[str, Any] = {}
  for axis in axes.flat:
    lines, labels = axis.get_legend_handles_labels()
    handles |= dict(zip(labels, lines, strict=True))
  figure.legend(
    list(handles.values()),
    list(handles),
    loc="outside lower center",
    ncols=len(handles),
  )
  data = _DATA.format(**records[0]["cell"])
  figure.suptitle(f"{title}\n{data}", fontsize="medium")
  return figure


def check(records: Sequence[Record]) -> None:
  """Raises `SystemExit` unless all records share seeds and batch size."""
  kinds = {(r["cell"]["num_seeds"], r["cell"]["batch_size"]) for r in records}
  if len(kinds) > 1:
    raise SystemExit(
      "error: results.jsonl must have one number of seeds and one batch size,"
      f" not {len(kinds)} pairs. Remove the other pairs' records."
    )


def figures(records: Sequence[Record]) -> dict[str, Figure]:
  """Signal and gradient by layer at initialisation; the spread in training.

  Lines are geometric means over the seeds; areas are the seeds' ranges.
  """

  def by_layer(quantity: str, record: Record):
    y = norms(record, quantity, 0)
    return range(1, y.shape[1] + 1), y

  def over_time(record: Record):
    steps = record["cell"]["measure_at"]
    return steps, np.stack([spread(record, step) for step in steps], axis=1)

  signal, gradients = (
    _panels(
      records,
      f"{title} at initialisation",
      "layer, images to loss",
      ylabel,
      functools.partial(by_layer, quantity),
    )
    for title, ylabel, quantity in (
      ("Signal", "output, root mean square", "activation"),
      ("Gradient", "gradient, Frobenius norm", "gradient"),
    )
  )
  training = _panels(
    [r for r in records if len(r["cell"]["measure_at"]) > 1],
    "Largest gradient of a layer divided by the smallest, in training",
    "steps done",
    "largest / smallest",
    over_time,
  )
  for axis in training.axes:
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(left=-0.1)
  return {"signal": signal, "gradients": gradients, "training": training}


def _number(value: float) -> str:
  if value < 1000:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"
  return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def table(records: Sequence[Record]) -> str:
  """The spread of the gradient and the loss, in Markdown.

  A cell is the geometric mean over the seeds and their range.
  """
  rows = []
  for record in sorted(records, key=lambda r: not r["cell"]["batch_norm"]):
    cell = record["cell"]
    for place, step in enumerate(cell["measure_at"]):
      ratios = spread(record, step)
      losses = np.asarray(
        [each["measured"][place]["loss"] for each in record["seeds"]],
        np.float64,
      )
      rows.append(
        [
          "with" if cell["batch_norm"] else "without",
          f"`{cell['family']}`",
          cell["depth"],
          step,
          _summary(ratios, geometric=True),
          _summary(losses, geometric=False),
        ]
      )
  titles = (
    *("batch norm", "network", "depth", "step"),
    *("largest ÷ smallest gradient", "loss of the batch"),
  )
  return markdown.table(titles, rows)


def _summary(values: np.ndarray, *, geometric: bool) -> str:
  finite = values[np.isfinite(values)]
  if not len(finite):
    return "not finite"
  mean = np.exp(np.log(finite).mean()) if geometric else finite.mean()
  text = f"{_number(mean)} ({_number(finite.min())} to {_number(finite.max())})"
  lost = len(values) - len(finite)
  return f"{text}; {lost} not finite" if lost else text


def main() -> None:
  """Writes the figures and the table beside the raw figures."""
  records = measurement.read(_FOLDER / "results.jsonl")
  check(records)
  for name, figure in figures(records).items():
    figure.savefig(_FOLDER / f"{name}.png", dpi=110)
  markdown.update(_FOLDER / "README.md", "spread", COMMAND, table(records))


if __name__ == "__main__":
  main()
