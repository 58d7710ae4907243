"""Draws the memory of the long run and of the undisturbed run.

python -m experiments.faults.plot
"""

import json
import pathlib

from matplotlib.figure import Figure

_FOLDER = pathlib.Path(__file__).parent
_TITLES = {"disturbed": "stopped again and again", "undisturbed": "undisturbed"}
_STYLES = {"SIGKILL": "-", "SIGTERM": ":"}


def main() -> None:
  """Writes memory.png from long_run.json."""
  results = json.loads((_FOLDER / "long_run.json").read_text())
  figure = Figure(figsize=(9, 4.5), layout="constrained")
  axes = figure.subplots(2, 1, sharex=True, sharey=True)
  for axis, (name, title) in zip(axes, _TITLES.items(), strict=True):
    run = results[name]
    minutes = 0.0
    for number, start in enumerate(run["starts"]):
      points = [
        (seconds / 60, megabytes)
        for seconds, which, megabytes in run["memory"]
        if which == number
      ]
      axis.plot(*zip(*points, strict=True), color="#0072b2")
      minutes += start["seconds"] / 60
      if start["signal"]:
        style = _STYLES[start["signal"]]
        axis.axvline(minutes, color="black", linestyle=style, linewidth=1)
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_ylabel("resident memory, MB")
    axis.grid(alpha=0.3)
  for signal, style in _STYLES.items():
    axes[0].plot([], [], color="black", linestyle=style, label=signal)
  axes[0].set_ylim(0)
  axes[0].legend(loc="lower right", ncols=2)
  axes[1].set_xlabel("time, minutes")
  figure.savefig(_FOLDER / "memory.png", dpi=150)


if __name__ == "__main__":
  main()
