"""One HTML page that has everything in it: no script, no other file."""

import base64
from collections.abc import Sequence
from typing import NamedTuple

import jinja2

from resnet_flax.tools.report.figures import Rendered
from resnet_flax.tools.report.tables import Table


class Section(NamedTuple):
  """A part of the page under one heading."""

  title: str  # The heading.
  notes: Sequence[str] = ()  # Paragraphs of plain text.
  figures: Sequence[Rendered] = ()  # Shown below them.
  tables: Sequence[Table] = ()  # Shown last.


def render(num_runs: int, num_groups: int, sections: Sequence[Section]) -> str:
  """The page as HTML."""
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("resnet_flax.tools.report", ""),
    # Names of folders and values of configurations are anyone's.
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters["base64"] = lambda raw: base64.b64encode(raw).decode()
  template = environment.get_template("page.html.jinja")
  return template.render(
    num_runs=num_runs, num_groups=num_groups, sections=sections
  )
