"""What makes a site of these pages, which also are read where they lie.

The front page is README.md. Other pages outside docs/ belong to the site, too.
Links to other files of the repository, such as code, become their names.
"""

import os
import pathlib
import re

from mkdocs.structure.files import File

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_OUTSIDE = "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md"
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:]*)(#[^)]*)?\)")


def on_files(files, config):
  """Adds the pages outside docs/, and the experiments with their figures."""
  outside = {"index.md": _ROOT / "README.md"}
  outside |= {name: _ROOT / name for name in _OUTSIDE}
  for pattern in ("README.md", "*.png"):
    for path in sorted((_ROOT / "experiments").rglob(pattern)):
      outside[path.relative_to(_ROOT).as_posix()] = path
  for uri, path in outside.items():
    files.append(File.generated(config, uri, abs_src_path=str(path)))
  return files


def on_page_markdown(markdown, page, config, files):
  """Turns links between files of the repository into links of the site."""
  here = pathlib.Path(page.file.abs_src_path).parent
  pages = {str(file.abs_src_path): file.src_uri for file in files}

  def turn(match):
    picture, text, target, anchor = match.groups(default="")
    if not target:
      return match[0]
    path = os.path.normpath(here / target)
    if path not in pages:
      assert os.path.exists(path), f"{page.file.src_uri}: {path}"
      return text
    there = os.path.relpath(pages[path], os.path.dirname(page.file.src_uri))
    return f"{picture}[{text}]({there}{anchor})"

  return _LINK.sub(turn, markdown)
