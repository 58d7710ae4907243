"""The table of depth's costs."""

from typing import Any

from experiments.tools import markdown

COLUMNS = (
  *("network", "batch", "mode", "trace and lower s", "compile s"),
  *("temporary MB", "peak MB", "s/step"),
)


def row(result: dict[str, Any]) -> str:
  """Formats one result of `measure` as a row in Markdown."""
  steps = result["step_seconds"]
  lowering = result["trace_step_seconds"] + result["lower_seconds"]
  cells = [
    f"{result['name'].removeprefix('resnet_')} {result['depth']}",
    result["batch_size"],
    result["mode"],
    f"{lowering:.1f}",
    f"{result['compile_seconds']:.1f}",
    f"{result['temporary_mb']:.0f}",
    f"{result['peak_mb']:.0f}",
    markdown.spread(steps, ".2f") if steps[1:] else f"{steps[0]:.2f}",
  ]
  return markdown.row(cells)
