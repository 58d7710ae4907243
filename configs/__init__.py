"""Experiments: `base.py` declares every key; the others are deltas over it."""
