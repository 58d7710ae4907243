"""Shim."""

from resnet_flax.run.checkpoint import Timer  # noqa: F401
from resnet_flax.run.interruption import Stopped, StopSignals  # noqa: F401
