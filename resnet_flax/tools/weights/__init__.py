"""Weights that other libraries have saved, for our networks."""
