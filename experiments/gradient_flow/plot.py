"""Draws the norms by layer and over time.

python -m experiments.gradient_flow.plot [RESULTS.jsonl]
"""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.gradient_flow import measurement

Record = measurement.Record

_FOLDER = pathlib.Path(__file__).parent
# Readable in black and white: markers and dashes differ, not only colours.
_STYLES = {
  "plain": ("#000000", "x", ":"),
  "highway": ("#e69f00", "v", "-."),
  "resnet_v1": ("#0072b2", "s", "-"),
  "resnet_v2": ("#009e73", "^", (0, (5, 1))),
  "preact": ("#cc79a7", "D", "--"),
}
_TITLES = {
  "gradient": "gradient's norm",
  "activation": "output's root mean square",
  "update_ratio": "|update| / |weight|",
}
# Projections and gates are beside the layers that depth counts.
_BESIDE = ("shortcut_conv", "gate_conv")
_MARKERS = 8
_MANY_LAYERS = 200
# Smaller ones, of single layers, would flatten all others.
_LEAST_UPDATE = 1e-4


def norms(record: Record, quantity: str, step: int) -> np.ndarray:
  """What was measured of a network.

  Args:
    record: of `measurement.read`.
    quantity: one of `measurement.QUANTITIES`.
    step: the number of steps done.

  Returns:
    float64[seeds, layers], without projections and gates; NaN where a number
    was not finite.
  """
  kept = [
    place
    for place, name in enumerate(record["layers"])
    if name.rpartition("/")[2] not in _BESIDE
  ]
  rows = [
    measured[quantity]
    for of_seed in record["seeds"]
    for measured in of_seed["measured"]
    if measured["step"] == step
  ]
  return np.asarray(rows, np.float64)[:, kept]


def _panels(
  records: Sequence[Record],
  xlabel: str,
  title: str,
  curve: Callable[[Record, str], tuple[np.ndarray, np.ndarray]],
  quantities: Sequence[str] = tuple(_TITLES),
) -> Any:
  """A figure with a row for each quantity and a column for each depth.

  Args:
    records: what to draw.
    xlabel: of all panels.
    title: of the figure.
    curve: of a record and a quantity, gives x, float64[N], and y,
      float64[seeds, N].
    quantities: of `measurement.QUANTITIES`.
  """
  depths = sorted({int(record["cell"]["depth"]) for record in records})
  alone = len(quantities) == 1
  width = 2.2 if alone else 3.3
  figure, axes = plt.subplots(
    len(quantities),
    len(depths),
    figsize=(width * len(depths) + 1.5, 1 + 2.4 * len(quantities)),
    sharey="row",
    squeeze=False,
    layout="constrained",
  )
  for record in records:
    cell = record["cell"]
    color, marker, line = _STYLES[cell["family"]]
    for row, quantity in enumerate(quantities):
      axis = axes[row, depths.index(cell["depth"])]
      x, y = curve(record, quantity)
      # A logarithm has no place for zero.
      y = np.ma.masked_invalid(np.where(y > 0, y, np.nan))
      axis.plot(
        x,
        np.exp(np.log(y).mean(axis=0)),
        color=color,
        linestyle=line,
        marker=marker,
        markersize=4,
        markevery=max(len(x) // _MARKERS, 1),
        # Many layers alternate between two values: let them not fill a panel.
        linewidth=1.2 if len(x) < _MANY_LAYERS else 0.5,
        label=cell["family"],
      )
      if len(y) > 1:
        axis.fill_between(
          x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.15
        )
  for row, quantity in enumerate(quantities):
    axes[row, 0].set_ylabel(_TITLES[quantity])
    for axis in axes[row]:
      axis.set_yscale("log")
      axis.grid(alpha=0.3)
      if quantity == "update_ratio":
        low, _ = axis.get_ylim()
        axis.set_ylim(bottom=max(low, _LEAST_UPDATE))
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
  figure.suptitle(title)
  return figure


def by_layer(
  records: Sequence[Record],
  step: int,
  title: str,
  quantities: Sequence[str] = tuple(_TITLES),
) -> Any:
  """A figure of the norms from the images to the loss.

  Args:
    records: what to draw; those that were not measured then are left out.
    step: the number of steps done.
    title: of the figure.
    quantities: of `measurement.QUANTITIES`.
  """

  def curve(record, quantity):
    y = norms(record, quantity, step)
    return np.arange(1, y.shape[1] + 1, dtype=np.float64), y

  shown = [r for r in records if step in r["cell"]["measure_at"]]
  xlabel = "layer, from the images to the loss"
  if len(quantities) == 1:
    xlabel = "layer"
  return _panels(shown, xlabel, title, curve, quantities)


def over_time(records: Sequence[Record], title: str) -> Any:
  """A figure of the norms over the steps, of each network's median layer.

  Args:
    records: what to draw; those that were not trained are left out.
    title: of the figure.
  """

  def curve(record, quantity):
    steps = record["cell"]["measure_at"]
    medians = [
      np.median(norms(record, quantity, step), axis=1) for step in steps
    ]
    return np.asarray(steps, np.float64), np.stack(medians, axis=1)

  shown = [r for r in records if len(r["cell"]["measure_at"]) > 1]
  figure = _panels(shown, "steps done", title, curve)
  for axis in figure.axes:
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(left=-0.1)
  return figure


def figures(records: Sequence[Record]) -> dict[str, Any]:
  """All figures by their names."""
  drawn = {}
  for has_norm, form in ((True, "batch_norm"), (False, "no_batch_norm")):
    of_form = [r for r in records if r["cell"]["batch_norm"] is has_norm]
    text = "with" if has_norm else "without"
    title = f"{text} batch norm"
    last = max((r["cell"]["measure_at"][-1] for r in of_form), default=0)
    if of_form:
      drawn[f"initial_{form}"] = by_layer(
        of_form, 0, f"At initialisation, {title}"
      )
    if of_form and has_norm:
      # For the README of the project.
      drawn["gradients"] = by_layer(
        of_form, 0, f"Gradients at initialisation, {title}", ["gradient"]
      )
    if last:
      drawn[f"trained_{form}"] = by_layer(
        of_form, last, f"After {last} steps, {title}"
      )
      drawn[f"time_{form}"] = over_time(
        of_form, f"Median of the layers, {title}"
      )
  return drawn


def main(arguments: Sequence[str] = ()) -> None:
  """Writes the figures beside the raw figures."""
  path = pathlib.Path(arguments[0] if arguments else _FOLDER / "results.jsonl")
  for name, figure in figures(measurement.read(path)).items():
    figure.savefig(path.parent / f"{name}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
  main(sys.argv[1:])
