"""Writes a trained network in the format of another library or program."""

import importlib
import logging
import os

from resnet_flax.run import errors, process, surroundings

_logger = logging.getLogger(__name__)

# The names that the arrays of each format can have, in the order of choice.
FORMATS = {
  "safetensors": ("torchvision", "cifar", "keras", "flax"),
  "torch": ("torchvision", "cifar"),
  "keras": ("keras",),
  **dict.fromkeys(("orbax", "stablehlo", "onnx"), ("flax",)),
}
NAMES = FORMATS["safetensors"]
# The module that a format needs; the extra of the same name installs it.
_NEEDED = {"torch": "torch", "keras": "h5py", "onnx": "onnx"}


def export(
  workdir: str | os.PathLike[str],
  out: str | os.PathLike[str],
  form: str,
  names: str = "",
  which: str = "best",
  seed: int | None = None,
  licence: str = "",
  weights: str = "raw",
) -> str:
  """Writes a network and the files that describe it into a new folder.

  See `load_model` for `workdir`, `which`, `seed` and `weights`. `form` is a key
  of `FORMATS`; `names=''` takes the first of its names that fit. Returns
  the network's name in that library, such as "torchvision's ResNet-18".
  """
  from resnet_flax.run import load, mirror
  from resnet_flax.tools import new_folder
  from resnet_flax.tools.export import card, weights as weights_lib

  out = new_folder.resolve(out, "--out")
  local = mirror.local(workdir, "workdir")
  loaded = load.load_model(local, which, seed=seed, weights=weights)
  reasons = []
  for chosen in [n for n in FORMATS[form] if names in ("", n)]:
    try:
      network = weights_lib.named(loaded, chosen)
      break
    except errors.WeightsError as error:
      reasons.append(str(error).rstrip("."))
  else:
    if not reasons:
      known = ", ".join(FORMATS[form])
      message = f"--format={form} has no --names={names}; it has: {known}."
      raise errors.ConfigError(message)
    raise errors.ConfigError(
      f"--format={form} cannot hold this network: {'; '.join(reasons)}. Pass"
      " --format=safetensors (with --names=flax), orbax or stablehlo for any"
      " network, or --format=onnx for any network without group norm."
    )
  if module := _NEEDED.get(form):
    advice = " Or pass --format=safetensors."
    with errors.extra(module, f"--format={form}", advice):
      importlib.import_module(module)
  if reasons and form == "safetensors":
    message = "note: the arrays have the names of %s: %s"
    _logger.info(message, chosen, "; ".join(reasons))
  with new_folder.fill(out, "--out") as folder:
    weights_lib.write(form, network, loaded, folder)
    card.write(folder, loaded, local, chosen, network.title, licence)
  return network.title


def main(argv: list[str]) -> None:
  """The command line."""
  parser = process.Parser("python -m resnet_flax.export", description=__doc__)
  add = parser.add_argument
  add("workdir", help="Folder of a run, or an address of checkpoint.mirror.")
  add("--format", choices=FORMATS, required=True)
  add("--out", required=True, help="New folder to write.")
  add("--names", choices=NAMES, default="", help="Names of the arrays.")
  add("--checkpoint", choices=("best", "latest"), default="best")
  add("--weights", choices=("raw", "ema", "swa"), default="raw")
  add("--seed", type=int, help="Seed of a run of several; default: the first.")
  add("--license", default="", help="Licence for the model card.")
  args = parser.parse_args(argv[1:])
  surroundings.set_up()
  title = export(
    *(args.workdir, args.out, args.format, args.names),
    *(args.checkpoint, args.seed, args.license, args.weights),
  )
  surroundings.show(f"Network: {title}\nFolder: {args.out}")
