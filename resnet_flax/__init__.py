"""Residual networks on CIFAR-10 in JAX and Flax.

`load_model` opens a trained workdir from Python. Everything else is reached
through its module, for example `resnet_flax.models.create_model`.
"""

from typing import Any

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
  # Imported on first use: the command line must be able to report a mistake,
  # or a Ctrl-C, before JAX and Flax are loaded.
  if name == "load_model":
    from resnet_flax.run.load import load_model

    return load_model
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
