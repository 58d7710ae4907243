"""Shim."""

from resnet_flax.run.config import check, check_labels  # noqa: F401
