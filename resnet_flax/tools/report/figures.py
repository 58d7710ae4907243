"""Figures that stay readable in print, in grey and for colour-blind readers.

The colours are Okabe and Ito's (2008). Markers or line styles repeat every
difference in colour. The same input gives bit-identical files.
"""

import contextlib
import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resnet_flax.tools.report import runs as runs_lib, scores as scores_lib

# Okabe and Ito's yellow is left out, since it is hard to see on white.
_COLORS = ["#000000", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7"]
_MARKERS = ("o", "s", "^", "X", "D", "v")
# More curves in one pair of axes could not be told apart.
_MOST_CURVES = len(_COLORS)
_MARKERS_OF_A_CURVE = 8
# The y axis ends at this multiple of the worst final value. This cuts the first
# epochs off, as in the papers, so that the last ones can be compared.
_CUT_AT = 3.0
# Counts in the confusion matrix are legible up to this many classes.
_MOST_NUMBERED_CLASSES = 20
_MISTAKES_IN_A_ROW = 5
_WIDEST = 84  # Characters per line.
_LONGEST_LABEL = 24  # Characters of a class name.

_STYLE = {
  "font.size": 10.0,
  "axes.grid": True,
  "grid.alpha": 0.3,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "legend.frameon": False,
  # Without a salt, the names of elements are random.
  "svg.hashsalt": "resnet_flax",
}


class Rendered(NamedTuple):
  """A figure in the forms that are written to files."""

  name: str  # The name of its files, without suffix.
  text: str  # A description for readers who cannot see it.
  caption: str  # What a reader must know to read it.
  png: bytes
  svg: bytes


# How the curves of each split are drawn. The most important split is last.
_LINES: dict[str, dict[str, Any]] = {
  "train": {"linewidth": 0.9, "dashes": (5, 2), "markersize": 3},
  "val": {"linewidth": 1.6, "linestyle": ":", "markersize": 5},
  "test": {"linewidth": 2.4, "markersize": 8, "markeredgecolor": "white"},
}
# Titles of the y axis that are not the metric's name.
_TITLES = {
  "accuracy": "error (%)",
  "top5": "top-5 error (%)",
  "loss": "cross-entropy (nats)",
}
# Maps each split with values to 1-based epochs and float64[seeds, epochs].
_Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def metric_names(groups: Sequence[runs_lib.Group]) -> list[str]:
  """The recorded metrics without the split, such as 'loss' of `train_loss`."""
  records = itertools.chain(*(run.records for g in groups for run in g.runs))
  parts = [key.partition("_") for key in set().union(*records)]
  return sorted({name for split, _, name in parts if split in _LINES})


def learning_curves(
  groups: Sequence[runs_lib.Group], metric: str, end: str = ""
) -> list[Rendered]:
  """Draws a metric over epochs: at most six groups per figure, with equal axes.

  All groups must have one data set, whose suffix in file names is `end`.
  """
  stem, _, last = metric.rpartition("_")
  title = _TITLES.get(metric, metric)
  if stem and last in ("accuracy", "top5"):
    title = f"{stem} {_TITLES[last]}"
  # Accuracies are drawn as errors.
  file = {"accuracy": "error", "error": "error_"}.get(metric, metric)
  drawn = [(group, c) for group in groups if (c := _curves(group, metric))]
  rendered = []
  for first in range(0, len(drawn), _MOST_CURVES):
    part = drawn[first : first + _MOST_CURVES]
    with _axes(7.2, 4.6, groups[0].data) as (figure, axes):
      for position, (group, curves) in enumerate(part):
        _draw_curves(axes, group, curves, position)
      # Empty curves, for the legend only.
      for split in reversed(_LINES):
        if any(split in curves for _, curves in part):
          axes.plot([], [], color="gray", label=split, **_LINES[split])
      num_epochs = max(group.num_epochs for group, _ in drawn)
      margin = 0.02 * num_epochs + 0.1
      axes.set_xlim(1 - margin, num_epochs + margin)
      axes.set_ylim(_limits([curves for _, curves in drawn]))
      axes.set(xlabel="epochs of training", ylabel=_plain(title))
      axes.xaxis.set_major_locator(MaxNLocator(integer=True))
      names = "; ".join(f"{group.number}: {group.name}" for group, _ in part)
      number = f"_{first // _MOST_CURVES + 1}" if drawn[_MOST_CURVES:] else ""
      rendered.append(
        _render(
          figure,
          f"learning_curves_{file}{end}{number}",
          text=f"{title} over the epochs on {groups[0].data}, for {names}.",
          caption="Curves are means over the seeds; ± one standard deviation is"
          " shaded. Training values are means over an epoch, while the network"
          " changes. Values above the axes are cut off.",
        )
      )
  return rendered


def _curves(group: runs_lib.Group, metric: str) -> _Curves:
  curves = {}
  for split in _LINES if group.num_epochs else ():
    values = group.curves(f"{split}_{metric}")
    # Older runs lack newer metrics; epochs without scoring lack test metrics.
    values = values[~np.isnan(values).all(axis=1)]
    known = ~np.isnan(values).any(axis=0)
    if (values := values[:, known]).size:
      if runs_lib.is_share(metric):
        values = 100 * (1 - values)
      curves[split] = 1 + np.flatnonzero(known), values
  return curves


def _limits(groups: Sequence[_Curves]) -> tuple[float, float]:
  """The lower and the upper end of the y axis."""
  arrays = [values for curves in groups for _, values in curves.values()]
  lowest = min(float(values.min()) for values in arrays)
  highest = max(float(values.max()) for values in arrays)
  if lowest < 0:
    return 1.1 * lowest, max(1.1 * highest, 0.0)
  final = max(float([*each.values()][-1][1][:, -1].max()) for each in groups)
  # The curve of a network without mistakes must stay visible.
  top = max(min(_CUT_AT * final, 1.05 * highest), 0.1 * highest) or 1.0
  # The axis starts at zero, unless most of the figure would be empty.
  return (0.0 if lowest < top / 3 else 0.9 * lowest), top


def _draw_curves(
  axes: Any, group: runs_lib.Group, curves: _Curves, position: int
) -> None:
  for split, (epochs, values) in curves.items():
    spacing = math.ceil(len(epochs) / _MARKERS_OF_A_CURVE)
    mean = values.mean(axis=0)
    look = {"color": _COLORS[position], "marker": _MARKERS[position]}
    # Shifted, so that the markers of similar curves do not hide each other.
    places = (position * spacing // _MOST_CURVES, spacing)
    (line,) = axes.plot(epochs, mean, markevery=places, **look, **_LINES[split])
    if len(values) > 1:
      std = values.std(axis=0, ddof=1)
      shade = {"color": _COLORS[position], "alpha": 0.2, "linewidth": 0}
      axes.fill_between(epochs, mean - std, mean + std, **shade)
  end = "" if group.finished else " (unfinished)"
  line.set_label(_plain(f"{group.number}: {group.name}{end}"))


def depth(groups: Sequence[runs_lib.Group], end: str = "") -> Rendered | None:
  """Draws final test error against depth; only depth differs within a line.

  See `learning_curves` for `end`. Returns None if no line has two depths.
  """
  families: dict[str, list[runs_lib.Group]] = {}
  for group in groups:
    if group.finished:
      key = repr(sorted(_without_depth(group).items()))
      families.setdefault(key, []).append(group)
  lines = list(families.values())
  if all(len(line) < 2 for line in lines):
    return None
  names = runs_lib.labels([_without_depth(line[0]) for line in lines])
  depths = sorted({g.config["model.depth"] for line in lines for g in line})
  with _axes(7.2, 4.4, groups[0].data) as (figure, axes):
    for position, line in enumerate(lines):
      finals = [g.statistic("last", "test_accuracy", 100) for g in line]
      cycle, place = divmod(position, _MOST_CURVES)
      axes.errorbar(
        [group.config["model.depth"] for group in line],
        [100 - final.mean for final in finals],
        yerr=[final.std or 0.0 for final in finals],
        capsize=4,
        linewidth=1.6,
        color=_COLORS[place],
        marker=_MARKERS[place],
        markersize=6,
        # The style tells lines of the same colour apart.
        linestyle=("-", "--", ":", "-.")[cycle % 4],
        label=_plain(names[position]),
      )
    if depths[-1] > 10 * depths[0]:
      axes.set_xscale("log")
    axes.set_xticks(depths, [str(d) for d in depths])
    axes.minorticks_off()
    ylabel = "test error after the last epoch (%)"
    axes.set(xlabel="depth (weighted layers)", ylabel=ylabel)
    return _render(
      figure,
      f"depth{end}",
      text=f"Final test error on {groups[0].data} against depths {depths} for"
      f" {'; '.join(names)}. The table of accuracies holds the values.",
      caption="The last epoch is shown, so no epoch was chosen. Only finished"
      " groups are shown. Bars are ± one standard deviation over the seeds; a"
      " point without a bar has one seed.",
    )


def _without_depth(group: runs_lib.Group) -> dict[str, Any]:
  return {k: v for k, v in group.config.items() if k != "model.depth"}


def confusion(scores: scores_lib.Scores, name: str, what: str) -> Rendered:
  """Draws the confusion matrix, shaded by the share of the true class.

  `what` describes the checkpoint to people; `name` is the name of the files.
  """
  matrix, classes = scores.confusion, len(scores.class_names)
  share = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  numbered = classes <= _MOST_NUMBERED_CLASSES
  size = 3.4 + 0.4 * classes if numbered else 8.0
  with _axes(size, size - 0.6) as (figure, axes):
    axes.grid(False)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, shrink=0.8, label="share of the true class (%)")
    axes.set(xlabel="predicted class", ylabel="true class")
    labels = [_short(label) for label in scores.class_names]
    font = {"fontsize": 10 if numbered else 4}
    turned = 90 if max(map(len, labels)) > 2 else 0
    axes.set_xticks(range(classes), labels, rotation=turned, **font)
    axes.set_yticks(range(classes), labels, **font)
    if numbered:
      for i, j in np.ndindex(matrix.shape):
        text = axes.text(j, i, str(matrix[i, j]), ha="center", va="center")
        text.set(fontsize=8, color="white" if share[i, j] > 50 else "black")
    return _render(
      figure,
      name,
      text=f"Confusion matrix of {what}. The tables below hold the accuracies"
      " of the classes and the most frequent confusions.",
      caption="Rows are true classes, columns predicted ones; "
      + ("numbers are test images; " if numbered else "")
      + "the shade is the share of the true class.",
    )


def mistakes(scores: scores_lib.Scores, name: str, what: str) -> Rendered:
  """Draws `scores.mistakes`, which must not be empty; see `confusion`."""
  rows = math.ceil(len(scores.mistakes) / _MISTAKES_IN_A_ROW)
  with _axes(7.2, 2.05 * rows) as (figure, axes):
    axes.remove()
    cells = figure.subplots(rows, _MISTAKES_IN_A_ROW, squeeze=False).ravel()
    for cell in cells:
      cell.axis("off")
    for cell, mistake in zip(cells, scores.mistakes, strict=False):
      cell.imshow(mistake.image, interpolation="none")
      cell.set_title(
        f"true: {_short(mistake.true)}\npredicted: {_short(mistake.predicted)}"
        f"\nwith {mistake.confidence:.1%}",
        fontsize=7.5,
      )
    return _render(
      figure,
      name,
      text=f"The {len(scores.mistakes)} most confident mistakes of {what};"
      " their labels are in the table of mistakes.",
      caption="Above each test image are its label, the predicted class and the"
      " probability of that class. The most confident mistake is first.",
    )


def _short(label: str) -> str:
  """Shortens a class name to fit beside a picture; tables have it in full."""
  if len(label) > _LONGEST_LABEL:
    label = f"{label[: _LONGEST_LABEL - 1]}…"
  return _plain(label)


def _plain(text: str) -> str:
  """Wraps text into lines; escapes dollar signs, which would begin formulas."""
  return textwrap.fill(runs_lib.shown(text), _WIDEST).replace("$", r"\$")


@contextlib.contextmanager
def _axes(
  width: float, height: float, title: str = ""
) -> Iterator[tuple[Figure, Any]]:
  """Yields a figure of this size, in inches, and its axes, in our style."""
  # The user's own settings are ignored, since they differ between machines.
  with style.context(["default", _STYLE]):
    figure = Figure((width, height), layout="constrained")
    yield figure, figure.add_subplot(title=_plain(title))


def _render(figure: Figure, name: str, *, text: str, caption: str) -> Rendered:
  _, labels = figure.axes[0].get_legend_handles_labels()
  if labels:
    columns = 1 if max(map(len, labels)) > _WIDEST // 2 else 2
    lines = sum(label.count("\n") + 1 for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.2 * lines / columns)
    figure.legend(loc="outside lower center", ncols=columns, fontsize=9)
  png, svg = io.BytesIO(), io.BytesIO()
  # The time and the library's version are left out, since they change.
  figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
  undated = {"Date": None, "Creator": None}
  figure.savefig(svg, format="svg", dpi=150, metadata=undated)
  name = re.sub(r"\W", "_", name)  # A metric or a data set may have a slash.
  return Rendered(name, text, caption, png.getvalue(), svg.getvalue())
