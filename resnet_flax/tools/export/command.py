"""Writes a trained network as other libraries and programs have theirs.

python -m resnet_flax.export WORKDIR --format=safetensors --out=DIR
"""

import argparse
import importlib.util
import os
from typing import NoReturn

from absl import flags

from resnet_flax.run import errors, process, surroundings

# For each format, whose names its arrays can have, the first choice first.
FORMATS = {
  "safetensors": ("torchvision", "cifar", "keras", "flax"),
  "torch": ("torchvision", "cifar"),
  "keras": ("keras",),
  **dict.fromkeys(("orbax", "stablehlo", "onnx"), ("flax",)),
}
NAMES = FORMATS["safetensors"]


def export(
  workdir: str | os.PathLike[str],
  out: str | os.PathLike[str],
  form: str,
  names: str = "",
  which: str = "best",
  seed: int | None = None,
  licence: str = "",
) -> str:
  """Writes a network, and what goes with it, into a new folder.

  Args:
    workdir: see `load.load_model`, also for `which` and `seed`.
    out: a folder that does not exist or is empty.
    form: a key of `FORMATS`.
    names: whose names the arrays get; '': the first that has such a network.
    licence: what the model card says of it.

  Returns:
    What the network is there, for example "torchvision's ResNet-18".

  Raises:
    ConfigError: there is no such network in this format or with these names,
      or no such seed.
    WorkdirError: `workdir` holds no network, or `out` cannot be written or
      holds something.
  """
  if form == "torch" and importlib.util.find_spec("torch") is None:
    raise errors.ConfigError(
      "--format=torch needs PyTorch, which is not installed: pip install"
      " 'resnet_flax[torch]'. --format=safetensors holds the same, without."
    )
  from resnet_flax.run import load, mirror
  from resnet_flax.tools import new_folder
  from resnet_flax.tools.export import card, weights

  out = new_folder.resolve(out, "--out")
  loaded = load.load_model(workdir, which, seed=seed)
  networks, reasons = {}, {}
  for each in NAMES:
    try:
      networks[each] = weights.named(loaded, each)
    except errors.WeightsError as error:
      reasons[each] = str(error).rstrip(".")
  asked = [n for n in FORMATS[form] if names in ("", n)]
  fitting = [n for n in asked if n in networks]
  if not fitting:
    # What there is instead.
    there = ", ".join(
      f"{other} ({', '.join(n for n in has if n in networks)})"
      for other, has in FORMATS.items()
      if networks.keys() & has
    )
    why = "; ".join(reasons[n] for n in asked) or f"no names of {names}"
    raise errors.ConfigError(
      f"--format={form} cannot have this network: {why}. There are: {there}."
    )
  network = networks[fitting[0]]
  with new_folder.fill(out, "--out") as folder:
    weights.write(form, network, loaded, folder)
    local = mirror.local(workdir, "workdir")
    form_and_names = form, fitting[0]
    card.write(folder, loaded, local, form_and_names, network.title, licence)
  return network.title


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    """Ends in one line, without the usage."""
    raise errors.ConfigError(f"{message}. --help says what there is.")


def _main(argv: list[str]) -> None:
  parser = _Parser("python -m resnet_flax.export", description=__doc__)
  add = parser.add_argument
  add("workdir", help="Folder of a run, or an address of checkpoint.mirror.")
  add("--format", choices=FORMATS, required=True)
  add("--out", required=True, help="Folder to make.")
  add("--names", choices=NAMES, default="", help="Whose names the arrays get.")
  add("--checkpoint", choices=("best", "latest"), default="best")
  add("--seed", type=int, help="Of a run of several; by default the first.")
  add("--license", default="", help="For the model card.")
  given = parser.parse_args(argv[1:])
  surroundings.set_up()
  from resnet_flax.run import signals

  # What is half written is removed before the process ends.
  with signals.StopSignals():
    title = export(
      *(given.workdir, given.out, given.format, given.names),
      *(given.checkpoint, given.seed, given.license),
    )
  surroundings.show(f"Network: {title}\nFolder: {given.out}")


def run() -> None:
  """Runs the command line; mistakes and signals end in one line."""
  # Absl wants to have parsed its flags, of which there are none here.
  process.run(_main, parse=lambda argv: flags.FLAGS(argv[:1]) + argv[1:])
