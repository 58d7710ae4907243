"""Draws the surfaces, measures their shapes and judges them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colors
from matplotlib.figure import Figure

from experiments.loss_surface.surface import axis
from experiments.tools import markdown
from experiments.tools.records import Record

# Limits that README.md set before the first surface.
RISE = 0.5  # Nats above the loss of the trained weights.
_NEGATIVE = 0.1  # Share of the larger eigenvalue's magnitude.
_ROUNDING = 1e-4  # Share of the loss; less may be rounding.
_WIDER = 2.0
_MORE_CONVEX = 10.0  # Percentage points.
# Higher losses and losses that are not finite share one colour.
_HIGHEST = 100.0
_PER_DECADE = 4


class Shape(NamedTuple):
  """The measured shape of a surface."""

  low: int  # Points that are at most `RISE` above the centre.
  not_convex: float  # Percent of `inner`.
  inner: int  # Inner points with finite neighbours only.


def losses(record: Record) -> np.ndarray:
  """A record's losses, float64[alpha, beta]; NaN where one was not finite."""
  return np.array(record["loss"], np.float64)


def measure(loss: np.ndarray) -> Shape:
  """The shape of a surface, float64[points, points]; see README.md."""
  half = len(loss) // 2
  low = np.sum(loss <= loss[half, half] + RISE)
  # The Hessian by central differences; both axes have the same step.
  inner = loss[1:-1, 1:-1]
  aa = loss[2:, 1:-1] - 2 * inner + loss[:-2, 1:-1]
  bb = loss[1:-1, 2:] - 2 * inner + loss[1:-1, :-2]
  ab = (loss[2:, 2:] - loss[2:, :-2] - loss[:-2, 2:] + loss[:-2, :-2]) / 4
  mean, radius = (aa + bb) / 2, np.hypot((aa - bb) / 2, ab)
  smaller, larger = mean - radius, mean + radius
  finite = np.isfinite(smaller)
  threshold = np.maximum(_NEGATIVE * np.abs(larger), _ROUNDING * inner)
  num_inner = int(finite.sum())
  share = np.sum((smaller < -threshold)[finite]) / max(num_inner, 1)
  return Shape(int(low), 100 * float(share), num_inner)


def _network(record: Record) -> str:
  model = record["of"]["config"]["model"]
  return (
    f"{model['name']}, {model['depth']} layers, {record['epochs']:g} epochs"
  )


def verdict(records: Sequence[Record]) -> str:
  """Compares a plain with a residual network by the rules of README.md."""
  kinds: dict[bool, list[Record]] = {True: [], False: []}
  for record in records:
    kinds[record["of"]["config"]["model"]["name"] == "plain"].append(record)
  if [len(group) for group in kinds.values()] != [1, 1]:
    return "The rules are for one plain and one residual network."
  plain, residual = (measure(losses(group)) for (group,) in kinds.values())
  # The centre is a low point, so that neither number is zero.
  ratio = residual.low / plain.low
  points = plain.not_convex - residual.not_convex
  shown = {
    "wider": ratio >= _WIDER,
    "narrower": ratio <= 1 / _WIDER,
    "more convex": points >= _MORE_CONVEX,
    "less convex": points <= -_MORE_CONVEX,
  }
  words = " and ".join(word for word, holds in shown.items() if holds)
  return (
    f"In this plane the residual network's surface is {words or 'no other'} by"
    f" the rules: {ratio:.2g} times as many low points, {points:+.1f} points of"
    " convexity."
  )


def table(records: Sequence[Record]) -> str:
  """The README's result section, from records that have all rows."""
  if not records:
    return "None yet: the runs have not ended."
  rows = []
  for record in records:
    loss, at = losses(record), axis(record)
    half, shape = len(at) // 2, measure(loss)
    row, column = np.unravel_index(np.nanargmin(loss), loss.shape)
    cells = [
      _network(record),
      f"{loss[half, half]:.4g}",
      f"{100 * record['error'][half][half]:.1f}",
      f"{loss[row, column]:.4g}, ({at[row]:.2g}, {at[column]:.2g})",
      f"{shape.low} of {loss.size}",
      f"{shape.not_convex:.1f} of {shape.inner}",
      f"{record['seconds'] / 60:.1f}",
    ]
    rows.append(cells)
  titles = (
    *("network", "loss at the centre", "error there %"),
    *("lowest loss, at (α, β)", "low points", "not convex %", "minutes"),
  )
  environments = {
    f"{each['cpu_threads']} threads of {each['cpu_model']} at commit"
    f" {str(each['git_commit'])[:7]}"
    for record in records
    for each in record["environments"]
  }
  paragraphs = [
    markdown.table(titles, rows),
    verdict(records),
    "![Both surfaces](surface.png)",
    f"Evaluated on {'; '.join(sorted(environments))}. Raw figures:"
    " [results.jsonl](results.jsonl).",
  ]
  return "\n\n".join(paragraphs)


def draw(records: Sequence[Record]) -> Figure:
  """A panel of filled contours for each network, in the same colours."""
  surfaces = [losses(record) for record in records]
  ends = [np.nanmin(surfaces), np.nanmax(surfaces)]
  ends = np.log10(np.clip(ends, 1e-6, _HIGHEST)) * _PER_DECADE
  exponents = np.arange(np.floor(ends[0]), np.ceil(ends[1]) + 1)
  levels = 10 ** (exponents / _PER_DECADE)
  size = 4.3 * len(records) + 1, 4.8
  figure = Figure(figsize=size, layout="constrained")
  axes = figure.subplots(1, len(records), sharey=True, squeeze=False)
  for panel, record, loss in zip(axes[0], records, surfaces, strict=True):
    at, centre = axis(record), loss[len(loss) // 2, len(loss) // 2]
    # Alpha, the first axis of `loss`, is drawn to the right.
    shown = np.nan_to_num(loss.T, nan=np.inf).clip(levels[0], 2 * levels[-1])
    norm = colors.LogNorm(levels[0], levels[-1])
    filled = panel.contourf(at, at, shown, levels, norm=norm, extend="max")
    if shown.max() > centre + RISE:
      edge = [centre + RISE]
      panel.contour(at, at, shown, edge, colors="w", linestyles="--")
    panel.plot(0, 0, "w+", markersize=10)
    panel.set(
      title=f"{_network(record)}\nloss at the centre: {centre:.4g}",
      xlabel="α, along the first direction",
      xticks=np.linspace(at[0], at[-1], 5),
      aspect="equal",
    )
  axes[0, 0].set_ylabel("β, along the second direction")
  bar = figure.colorbar(filled, ax=axes[0].tolist(), format="%g")
  bar.set_label("mean cross-entropy")
  bar.set_ticks(levels[exponents % _PER_DECADE == 0])
  bar.ax.minorticks_off()
  num_images = records[0]["of"]["plane"]["examples"]
  figure.suptitle(
    f"Loss of {num_images:,} training images, CIFAR-10 (JPEG copy), along two"
    f" random\nfilter-normalised directions; dashed: centre + {RISE:g}",
    fontsize="medium",
  )
  return figure
