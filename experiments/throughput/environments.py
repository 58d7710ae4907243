"""Makes the virtual environments of the other frameworks.

  python -m experiments.throughput.environments [--peers=.peers]

A framework's requirements may conflict with ours, so each has an environment.
"""

import argparse
import pathlib
import shutil
import subprocess
import venv

from resnet_flax.run import errors

_FOLDER = pathlib.Path(__file__).parent
ROOT = _FOLDER.parent.parent
DEFAULT = ROOT / ".peers"
PEERS = ("keras", "torch")


def python(peers: pathlib.Path, name: str) -> str:
  """The interpreter of a peer's environment; `UserError` if there is none."""
  path = _python(peers, name)
  if not path.is_file():
    raise errors.UserError(
      f"{peers} has no environment for {name}. Make it with"
      f" 'python -m experiments.throughput.environments --peers={peers}', or"
      f" leave {name} out of --programs."
    )
  return str(path)


def _python(peers: pathlib.Path, name: str) -> pathlib.Path:
  return peers.absolute() / name / "bin" / "python"


def make(peers: pathlib.Path, name: str) -> None:
  """Makes a peer's environment, unless it exists.

  Raises `UserError` if its requirements cannot be installed.
  """
  if _python(peers, name).is_file():
    print(f"{peers / name} already exists.")
    return
  requirements = _FOLDER / "requirements" / f"{name}.txt"
  try:
    venv.create(peers / name, with_pip=True)
    install = ("-m", "pip", "install", "--requirement", requirements)
    subprocess.run([_python(peers, name), *install], check=True)
  except BaseException as error:
    # The next call would take an incomplete environment for a complete one.
    shutil.rmtree(peers / name, ignore_errors=True)
    if isinstance(error, subprocess.CalledProcessError):
      raise errors.UserError(
        f"{requirements} could not be installed: see pip's messages above."
      ) from error
    raise


def main() -> None:
  """Makes all environments."""
  parser = argparse.ArgumentParser(description="Makes the environments.")
  parser.add_argument("--peers", type=pathlib.Path, default=DEFAULT)
  peers = parser.parse_args().peers
  for name in PEERS:
    try:
      make(peers, name)
    except errors.UserError as error:
      raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
  main()
