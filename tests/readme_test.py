import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
READMES = sorted(
  path for path in [*ROOT.glob("*.md"), *ROOT.glob("experiments/*/*.md")]
)


@pytest.mark.parametrize(
  "path", READMES, ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_lead_somewhere(path):
  for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
    if not target.startswith("http"):
      assert (path.parent / target).exists(), target


def test_commands_name_configs_that_exist():
  text = "\n".join(path.read_text() for path in READMES)
  names = set(re.findall(r"--config=(\S+\.py)", text))
  assert "configs/quickstart.py" in names
  for name in names:
    assert (ROOT / name).exists(), name
