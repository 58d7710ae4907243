"""Gives hostile archives to the archive reader and reports what comes of it.

  python -m experiments.fuzz --out=FILE.json [--minutes=10] [--seed=0]
    [--findings=FOLDER] [--only=INDEX]

Inputs are read in a child process with a limit on its memory, and the parent
ends it when one takes too long. What is no `DataError` of one line, and no
valid arrays either, is a finding: its file is kept, and --only reads it again.
"""

import pathlib
import platform
import sys
import tempfile

from absl import app, flags

from experiments.fuzz import mutations, reading
from resnet_flax.run import environment, folder as workdir

_MINUTES = flags.DEFINE_float("minutes", 10.0, "How long to go on.")
_SEED = flags.DEFINE_integer("seed", 0, "Of all inputs.")
_OUT = flags.DEFINE_string("out", "", "JSON file with the raw counts.")
_FINDINGS = flags.DEFINE_string("findings", "", "Folder for findings.")
_ONLY = flags.DEFINE_integer("only", None, "Read this input alone, here.")


def main(argv: list[str]) -> None:
  """Fuzzes, prints a table, and fails if there are findings."""
  del argv
  if _ONLY.value is not None:
    kind, raw = mutations.make(_SEED.value, _ONLY.value)
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "hostile.tar.gz"
      path.write_bytes(raw)
      print(kind, *reading.judge(path, reading.intact_contents(path.parent)))
    return
  findings = pathlib.Path(_FINDINGS.value) if _FINDINGS.value else None
  results = reading.fuzz(_SEED.value, 60 * _MINUTES.value, findings)
  print(reading.table(results), flush=True)
  if _OUT.value:
    described = {
      "seed": _SEED.value,
      "time_limit_seconds": reading.TIME_LIMIT,
      "memory_limit_mb": reading.MEMORY_LIMIT / 1e6,
      "python": platform.python_version(),
      "platform": platform.platform(),
      "cpu_model": environment.cpu_model(),
    }
    workdir.write_json(pathlib.Path(_OUT.value), described | results)
  if results["findings"]:
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
