"""What makes a site of these pages, which also are read where they lie.

The pages of `experiments/` and their figures belong to it. Links to other files
of the repository, such as code, become their names.
"""

import os
import pathlib
import re

from mkdocs.structure.files import File

_ROOT = pathlib.Path(__file__).parent.parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:]*)(#[^)]*)?\)")


def on_files(files, config):
  """Adds the experiments."""
  for pattern in ("README.md", "*.png"):
    for path in sorted((_ROOT / "experiments").rglob(pattern)):
      uri = path.relative_to(_ROOT).as_posix()
      files.append(File.generated(config, uri, abs_src_path=str(path)))
  return files


def on_page_markdown(markdown, page, config, files):
  """Turns links between files of the repository into links of the site."""
  uri = page.file.src_uri
  here = uri if uri.startswith("experiments/") else f"docs/{uri}"

  def turn(match):
    picture, text, target, anchor = match.groups(default="")
    if not target:
      return match[0]
    path = os.path.normpath(os.path.join(os.path.dirname(here), target))
    there = path.removeprefix("docs/")
    if files.get_file_from_path(there) is None or not path.startswith(
      ("docs/", "experiments/")
    ):
      assert (_ROOT / path).exists(), f"{here}: {path}"
      return text
    return (
      f"{picture}[{text}]"
      f"({os.path.relpath(there, os.path.dirname(uri) or '.')}{anchor})"
    )

  return _LINK.sub(turn, markdown)
