"""Flags and keys as text, for `--help` and for the documentation.

python -m resnet_flax.run.help_text > docs/configuration.md
"""

import itertools
import re
import sys
import textwrap
from typing import Any, NamedTuple

from absl import flags

from resnet_flax.run import errors, surroundings
from resnet_flax.run.config import KEYS

_PAGE = """\
# Configuration

Every key with its default, printed by `python -m resnet_flax.run.help_text`
from the table in [`resnet_flax/run/config.py`](../resnet_flax/run/config.py). A
config file sets keys; so does the command line, after `--config`:
`--config.model.depth=56`.

A run must be resumed with the configuration that it was started with, except
for keys that "may differ" and for a [longer run](resume.md#make-a-run-longer).
Some keys are read only by some networks (`model.name`), optimizers
(`optimizer.name`) or schedules (`schedule.name`); with others they must keep
their defaults.
"""
_TABLE = """
## {}

| key | default | values | meaning | may differ | read by |
| --- | --- | --- | --- | --- | --- |
"""


class _Entry(NamedTuple):
  part: str
  name: str
  default: str
  text: str

  def __str__(self) -> str:
    title = f"{self.name}={self.default}".removesuffix("=")
    text = textwrap.wrap(self.text, 80 - 6)
    return f"  {title}\n" + textwrap.indent("\n".join(text), " " * 6)


def show_if_asked(argv: list[str]) -> None:
  """If an argument asks for help, prints it and exits with code 0."""
  help_flag = re.compile(r"--?(?:h|\?|help(?:short|full)?)(?:=(.*))?")
  for argument in itertools.takewhile(lambda each: each != "--", argv[1:]):
    if match := help_flag.fullmatch(argument):
      modules = flags.FLAGS.flags_by_module_dict()
      # `resnet_flax.convert` defines no flags; its module in `tools` does.
      tools = [name for name in modules if ".tools." in name]
      program = argv[0] if argv[0] in modules else (tools or argv)[0]
      surroundings.show(program_help(match[1] or "", program))
      sys.exit(0)


def program_help(wanted: str, program: str) -> str:
  """A program's flags and, if it has --config, all keys, in 80 columns.

  `wanted` selects a part, a name, or a word in names or meanings; '' for all.
  `program` names the module whose key flags are the program's.
  """
  entries = _entries(program)
  parts = ", ".join(dict.fromkeys(entry.part for entry in entries))
  word = wanted.removeprefix("--").removeprefix("config.").lower()
  chosen = (
    [entry for entry in entries if word in ("", entry.part)]
    or [entry for entry in entries if word == entry.name.removeprefix("--")]
    or [e for e in entries if word in e.name or word in e.text.lower()]
  )
  if wanted and not chosen:
    raise errors.ConfigError(
      f"--help={wanted}: no flag and no key has this word. Parts: {parts}."
    )
  lines = []
  for part, part_entries in itertools.groupby(chosen, lambda entry: entry.part):
    how_to_set = ", set by --config.KEY=VALUE after --config"
    lines += ["", f"{part}{'' if part == 'flags' else how_to_set}:"]
    lines += map(str, part_entries)
  if not wanted:
    module = sys.modules.get(program) or sys.modules["__main__"]
    hint = f"--help=WORD shows a part ({parts}) or entries with this word."
    summary = (module.__doc__ or "").strip()
    lines = [summary, *lines, "", textwrap.fill(hint, 80)]
  return "\n".join(lines).strip()


def _entries(program: str) -> list[_Entry]:
  program_flags = flags.FLAGS.get_key_flags_for_module(program)
  entries = [
    _Entry("flags", f"--{flag.name}", _typed(flag.default), flag.help)
    for flag in program_flags
  ]
  if all(flag.name != "config" for flag in program_flags):
    return entries
  for key in KEYS.values():
    text = f"{key.meaning} Values: {key.values.requirement}."
    text += " May differ when a run is resumed." * key.may_differ
    text += f" Read by {', '.join(key.read_by)}." * bool(key.read_by)
    entries.append(_Entry(key.part, key.name, _typed(key.default), text))
  return entries


def _typed(value: Any) -> str:
  """A default as it is typed on the command line."""
  if isinstance(value, tuple):
    return ",".join(map(str, value))
  text = "" if value is None else str(value)
  return text.lower() if isinstance(value, bool) else text


def page() -> str:
  """The page docs/configuration.md, in Markdown."""
  text = _PAGE
  for part, keys in itertools.groupby(KEYS.values(), lambda key: key.part):
    text += _TABLE.format(part)
    for key in keys:
      default = f"`{_typed(key.default)}`" if key.default != "" else ""
      meaning = key.meaning.replace("*", r"\*")
      cells = [f"`{key.name}`", default, key.values.requirement, meaning]
      cells += ["yes" if key.may_differ else "", ", ".join(key.read_by)]
      text += f"| {' | '.join(cells)} |\n"
  return text


if __name__ == "__main__":
  print(page(), end="")
