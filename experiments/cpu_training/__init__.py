"""Whole training runs on a CPU, ours and in stock Flax; see README.md."""
