"""Writes trained networks to files of other libraries and programs."""
