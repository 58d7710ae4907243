"""Residual networks on CIFAR-10 in JAX and Flax.

`load_model` loads a trained network from its workdir. `create_model` builds an
untrained one; `list_models` lists the names that it takes. Everything else is
imported from its module, for example `resnet_flax.data.load`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from resnet_flax.run.create import create_model, list_models
  from resnet_flax.run.load import load_model

__all__ = ["create_model", "list_models", "load_model"]
_MODULES = {
  "load_model": "load",
  "create_model": "create",
  "list_models": "create",
}


def __getattr__(name: str) -> Any:
  # Imported on first use: the command line must be able to report a mistake,
  # or a Ctrl-C, before JAX and Flax are loaded.
  if name == "__version__":
    from importlib import metadata

    return metadata.version("resnet_flax")
  if name in __all__:
    module = importlib.import_module(f"resnet_flax.run.{_MODULES[name]}")
    return getattr(module, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__, "__version__"])
