"""The cost of options in a training step."""
