"""Converted weights against the libraries that they come from."""
