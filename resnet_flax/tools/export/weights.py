"""Gives a network's arrays a library's names, and writes them to files."""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from safetensors import numpy as safetensors_numpy

from resnet_flax.run import checkpoint, errors
from resnet_flax.run.load import LoadedModel
from resnet_flax.tools.weights import files, keras_names, mapping, pytorch_names


class Network(NamedTuple):
  """A network with the names and layouts of a library."""

  title: str  # For example "torchvision's ResNet-18".
  arrays: Mapping[str, np.ndarray]  # float32 by name, in the library's layouts.


def named(loaded: LoadedModel, names: str) -> Network:
  """Renames arrays as 'torchvision', 'cifar', 'keras' or 'flax' (ours) does.

  Raises `WeightsError` if the library has no network that computes the same.
  """
  model = loaded.config.model
  flat = traverse_util.flatten_dict(jax.device_get(loaded.variables))
  if names == "flax":
    ours = {"/".join(path): array for path, array in flat.items()}
    return Network(f"resnet_flax's {model.name}", ours)
  library = keras_names if names == "keras" else pytorch_names
  origin_of = library.origin_of(names, model)
  if origin_of is None:
    raise errors.WeightsError(f"{names} has no {model.name}")
  with files.explain(f"{names} lacks layers of this {model.name}"):
    origins = [(origin_of(path), array) for path, array in flat.items()]
    arrays = {origin.name: origin.to_library(x) for origin, x in origins}
  # `identify` finds the network as if the library had written these arrays.
  file = files.WeightsFile(pathlib.Path("the network"), "", arrays, ())
  source = library.identify(file)
  wrong = mapping.differing(source, loaded.config)
  wrong.pop("normalization", None)  # It is not part of the library's network.
  if wrong:
    flags = ", ".join(wrong.values())
    raise errors.WeightsError(f"{source.title} would need {flags}")
  side = model.input_size or loaded.image_shape[0]
  if (
    names == "keras" and model.name != "resnet_imagenet" and -(-side // 4) != 8
  ):
    raise errors.WeightsError(
      f"{source.title} pools 8x8 pixels, as 32x32 images give; these images are"
      f" {side}x{side}"
    )
  return Network(source.title, arrays)


def write(
  form: str, network: Network, loaded: LoadedModel, folder: pathlib.Path
) -> None:
  """Writes the files of a format; turns a library's errors into `OSError`."""
  arrays = {k: np.ascontiguousarray(a) for k, a in network.arrays.items()}
  with checkpoint.only_os_errors():
    match form:
      case "safetensors":
        safetensors_numpy.save_file(arrays, folder / "weights.safetensors")
      case "torch":
        import torch

        state = {name: torch.tensor(array) for name, array in arrays.items()}
        torch.save(state, folder / "weights.pt")
      case "keras":
        import h5py

        model = loaded.config.model
        places = keras_names.automatic_names(
          model.name, model.depth, as_created=False
        )
        with h5py.File(folder / "model.weights.h5", "w") as file:
          for path, name in keras_names.names_of(model).items():
            place = places[path]
            group = file.create_group(f"layers/{place}/vars")
            group.attrs["name"] = name
            variables = files.VARIABLES[files.layer_class(place)]
            for k, variable in enumerate(variables):
              group[str(k)] = arrays[f"{name}/{variable}"]
      case "orbax":
        variables = jax.device_get(loaded.variables)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
          checkpointer.save(folder / "checkpoint", variables)
      case "stablehlo" | "onnx":
        from resnet_flax.tools.export import programs

        getattr(programs, f"write_{form}")(loaded, folder)
