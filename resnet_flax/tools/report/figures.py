"""Figures that are read in print, in black and white and by the colour-blind.

Colours are those of Okabe and Ito (2008); what they tell apart, markers or
lines do as well. The same input gives the same bytes.
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

from resnet_flax.run import metrics
from resnet_flax.tools.report import runs as runs_lib, scores as scores_lib

# Without their yellow, which is lost on white.
_COLORS = ["#000000", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7"]
_MARKERS = ("o", "s", "^", "X", "D", "v")
# What can be told apart in one pair of axes.
_MOST_CURVES = len(_COLORS)
_MARKERS_OF_A_CURVE = 8
# As in the papers, the first epochs are cut off at the top, so that the last
# ones can be compared: at this multiple of the worst final value.
_CUT_AT = 3.0
# Counts are legible up to this many classes.
_MOST_NUMBERED_CLASSES = 20
_MISTAKES_IN_A_ROW = 5
_WIDEST = 84  # Characters of a line.

_STYLE = {
  "font.size": 10.0,
  "axes.grid": True,
  "grid.alpha": 0.3,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "legend.frameon": False,
  # Names of elements; random otherwise.
  "svg.hashsalt": "resnet_flax",
}


class Rendered(NamedTuple):
  """A figure as it is written."""

  name: str  # Of its files, without suffix.
  text: str  # What it shows, for those who do not see it.
  caption: str  # What one must know to read it.
  png: bytes
  svg: bytes


# How the values of each split are drawn; those that one looks for are last.
_LINES: dict[str, dict[str, Any]] = {
  "train": {"linewidth": 0.9, "dashes": (5, 2), "markersize": 3},
  "val": {"linewidth": 1.6, "linestyle": ":", "markersize": 5},
  "test": {"linewidth": 2.4, "markersize": 8, "markeredgecolor": "white"},
}
# Of the axis, where it is not the metric's name.
_TITLES = {
  "accuracy": "error (%)",
  "top5": "top-5 error (%)",
  "loss": "cross-entropy (nats)",
}
# Of each split that has values, the epochs, from 1, and float64[n, epochs].
_Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def metric_names(groups: Sequence[runs_lib.Group]) -> list[str]:
  """What is recorded of a split, for example 'loss' for `train_loss`."""
  records = itertools.chain(*(run.records for g in groups for run in g.runs))
  keys = {key for record in records for key in metrics.of_seeds(record)[0]}
  parts = [key.partition("_") for key in keys]
  return sorted({name for split, _, name in parts if split in _LINES})


def learning_curves(
  groups: Sequence[runs_lib.Group], metric: str, end: str = ""
) -> list[Rendered]:
  """Curves over the epochs, a few groups in each figure, on the same axes.

  They are of one data set; `end` is that of the names of the files.
  """
  title = metric.replace("_accuracy", " error (%)")
  title = _TITLES.get(metric, title.replace("_top5", " top-5 error (%)"))
  # Accuracies are drawn as errors.
  file = {"accuracy": "error", "error": "error_"}.get(metric, metric)
  drawn = [(group, c) for group in groups if (c := _curves(group, metric))]
  rendered = []
  for first in range(0, len(drawn), _MOST_CURVES):
    part = drawn[first : first + _MOST_CURVES]
    with _axes(7.2, 4.6, groups[0].data) as (figure, axes):
      for position, (group, curves) in enumerate(part):
        _draw_curves(axes, group, curves, position)
      # For the legend.
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
          re.sub(r"\W", "_", f"learning_curves_{file}{end}{number}"),
          text=f"{title} over the epochs on {groups[0].data}, for {names}.",
          caption="Mean over the seeds, shaded ± their standard deviation"
          " where there are several. Training values are means over an epoch,"
          " while the network changes. What is above the axes is cut off.",
        )
      )
  return rendered


def _curves(group: runs_lib.Group, metric: str) -> _Curves:
  found = {}
  for split in _LINES if group.num_epochs else ():
    values = group.curves(f"{split}_{metric}")
    # Seeds and epochs from before the metric was added have none.
    values = values[~np.isnan(values).all(axis=1)]
    known = ~np.isnan(values).any(axis=0)
    if (values := values[:, known]).size:
      if runs_lib.is_share(metric):
        values = 100 * (1 - values)
      found[split] = 1 + np.flatnonzero(known), values
  return found


def _limits(groups: Sequence[_Curves]) -> tuple[float, float]:
  """The ends of the axis."""
  every = [values for curves in groups for _, values in curves.values()]
  lowest = min(float(values.min()) for values in every)
  highest = max(float(values.max()) for values in every)
  if lowest < 0:
    return 1.1 * lowest, max(1.1 * highest, 0.0)
  final = max(float([*each.values()][-1][1][:, -1].max()) for each in groups)
  # Of a network that makes no mistake something is still to be seen.
  top = max(min(_CUT_AT * final, 1.05 * highest), 0.1 * highest) or 1.0
  # From zero, unless that would leave most of the figure empty.
  return (0.0 if lowest < top / 3 else 0.9 * lowest), top


def _draw_curves(
  axes: Any, group: runs_lib.Group, curves: _Curves, position: int
) -> None:
  every = math.ceil(group.num_epochs / _MARKERS_OF_A_CURVE)
  for split, (epochs, values) in curves.items():
    mean = values.mean(axis=0)
    look = {"color": _COLORS[position], "marker": _MARKERS[position]}
    # Markers of like curves do not hide each other.
    places = (position * every // _MOST_CURVES, every)
    (line,) = axes.plot(epochs, mean, markevery=places, **look, **_LINES[split])
    if len(values) > 1:
      std = values.std(axis=0, ddof=1)
      shade = {"color": _COLORS[position], "alpha": 0.2, "linewidth": 0}
      axes.fill_between(epochs, mean - std, mean + std, **shade)
  end = "" if group.finished else " (unfinished)"
  line.set_label(_plain(f"{group.number}: {group.name}{end}"))


def depth(groups: Sequence[runs_lib.Group], end: str = "") -> Rendered | None:
  """Final test error against depth; one line for what differs in depth alone.

  See `learning_curves`. None if no line has two depths.
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
      line.sort(key=lambda group: group.config["model.depth"])
      finals = [g.statistic("last", "test_accuracy", 100) for g in line]
      again, place = divmod(position, len(_COLORS))
      axes.errorbar(
        [group.config["model.depth"] for group in line],
        [100 - final.mean for final in finals],
        yerr=[final.std or 0.0 for final in finals],
        capsize=4,
        linewidth=1.6,
        color=_COLORS[place],
        marker=_MARKERS[place],
        markersize=6,
        # Tells apart more lines than there are colours.
        linestyle=("-", "--", ":", "-.")[again % 4],
        label=_plain(names[position]),
      )
    if depths[-1] > 10 * depths[0]:
      axes.set_xscale("log")
    axes.set_xticks(depths, [str(d) for d in depths])
    axes.minorticks_off()
    axes.set_xlabel("depth (weighted layers)")
    axes.set_ylabel("test error after the last epoch (%)")
    return _render(
      figure,
      f"depth{end}",
      text=f"Final test error on {groups[0].data} against depths {depths} for"
      f" {'; '.join(names)}. The table of accuracies holds the values.",
      caption="After the last epoch, so that nothing was chosen; finished"
      " groups only. Bars are ± one standard deviation over the seeds; a point"
      " without a bar is of one seed.",
    )


def _without_depth(group: runs_lib.Group) -> dict[str, Any]:
  return {k: v for k, v in group.config.items() if k != "model.depth"}


def confusion(scores: scores_lib.Scores, name: str, what: str) -> Rendered:
  """The confusion matrix, shaded by the share of the true class.

  Of the checkpoint that is `what` for people; `name` is that of the files.
  """
  matrix = scores.confusion
  classes = len(matrix)
  of_class = matrix.sum(axis=1, keepdims=True)
  share = 100 * matrix / np.maximum(of_class, 1)
  numbered = classes <= _MOST_NUMBERED_CLASSES
  size = 3.4 + 0.4 * classes if numbered else 8.0
  with _axes(size, size - 0.6) as (figure, axes):
    axes.grid(False)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    label = "share of the true class (%)"
    figure.colorbar(image, ax=axes, shrink=0.8, label=label)
    axes.set(xlabel="predicted class", ylabel="true class")
    labels = [_plain(label) for label in scores.class_names]
    font = {"fontsize": 10 if numbered else 4}
    turned = 90 if max(map(len, labels)) > 2 else 0
    axes.set_xticks(range(classes), labels, rotation=turned, **font)
    axes.set_yticks(range(classes), labels, **font)
    if numbered:
      for i, j in np.ndindex(matrix.shape):
        text = axes.text(j, i, str(matrix[i, j]), ha="center", va="center")
        text.set(fontsize=8, color="white" if share[i, j] > 50 else "black")
        # What is not there is no news.
        text.set_alpha(1.0 if matrix[i, j] else 0.35)
    return _render(
      figure,
      name,
      text=f"Confusion matrix of {what}: {scores.num_correct} of"
      f" {scores.num_images} test images are on the diagonal. The tables below"
      " hold the accuracy of each class and what is confused most often.",
      caption="Rows are true classes, columns predicted ones; "
      + ("numbers are test images; " if numbered else "")
      + "the shade is the share of the true class.",
    )


def mistakes(scores: scores_lib.Scores, name: str, what: str) -> Rendered:
  """A sheet of the most confident mistakes, of which there is at least one.

  See `confusion`.
  """
  rows = math.ceil(len(scores.mistakes) / _MISTAKES_IN_A_ROW)
  with _axes(7.2, 2.05 * rows) as (figure, axes):
    axes.remove()
    cells = figure.subplots(rows, _MISTAKES_IN_A_ROW, squeeze=False).ravel()
    for cell in cells:
      cell.axis("off")
    for cell, mistake in zip(cells, scores.mistakes, strict=False):
      cell.imshow(mistake.image, interpolation="none")
      cell.set_title(
        f"true: {_plain(mistake.true)}\npredicted: {_plain(mistake.predicted)}"
        f"\nwith {mistake.confidence:.1%}",
        fontsize=7.5,
      )
    return _render(
      figure,
      name,
      text=f"The {len(scores.mistakes)} most confident mistakes of {what};"
      " their labels are in the table of mistakes.",
      caption="Above each test image its label, then what was predicted and"
      " with which probability; the most confident first.",
    )


def _plain(text: str) -> str:
  """Text in lines that fit, in which a dollar sign begins no formula."""
  return textwrap.fill(runs_lib.shown(text), _WIDEST).replace("$", r"\$")


@contextlib.contextmanager
def _axes(
  width: float, height: float, title: str = ""
) -> Iterator[tuple[Figure, Any]]:
  """A figure of this size, in inches, with one pair of axes, in our style."""
  # Not the user's own settings, which differ between machines.
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
  # Neither the time nor the version of the library.
  figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
  undated = {"Date": None, "Creator": None}
  figure.savefig(svg, format="svg", dpi=150, metadata=undated)
  return Rendered(name, text, caption, png.getvalue(), svg.getvalue())
