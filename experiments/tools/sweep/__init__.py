"""Runs a base configuration with a grid of overrides, from one file."""
