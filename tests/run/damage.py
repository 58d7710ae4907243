"""What may lie in a workdir in place of a file that a run has written."""

import os

KINDS = ("pipe", "device", "folder", "deep", "long", "bytes")


def replace(path, kind):
  """Puts a file there that blocks, has no end, or is no JSON object."""
  path.unlink(missing_ok=True)
  if kind == "pipe":
    os.mkfifo(path)
  elif kind == "device":
    path.symlink_to("/dev/zero")
  elif kind == "folder":
    path.mkdir()
  elif kind == "deep":
    path.write_text("[" * 100_000 + "]" * 100_000 + "\n{}\n")
  elif kind == "long":
    with path.open("wb") as file:
      file.truncate(1 << 40)  # It takes no room.
  else:
    path.write_bytes(b"\xff\0\n\xff")
