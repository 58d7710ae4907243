"""The loss of trained networks on a plane of their weights."""
